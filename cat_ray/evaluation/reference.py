"""What samples are compared with: statistics of real images, as ADM publishes them.

Such a file, of which `VIRTUAL_imagenet256_labeled.npz` is one, holds `mu` and `sigma` of the pooled
features of all training images, `mu_s` and `sigma_s` of the spatial ones, and 10,000 images as
`arr_0` (guided-diffusion, evaluations/README.md).
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from cat_ray.errors import BadInput
from cat_ray.evaluation.distance import Moments
from cat_ray.evaluation.npz import Npz
from cat_ray.storage import Location

POOLED, SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")
READ_BYTES = 2**24


@dataclass(frozen=True)
class Reference:
    """Statistics of real images.

    Attributes:
        sha256: of the file.
        pooled: moments of the pooled features.
        spatial: moments of the spatial ones, if the file has any.
    """

    sha256: str
    pooled: Moments
    spatial: Moments | None


def read_reference(place: Location, pooled_width: int, spatial_width: int) -> Reference:
    """The statistics in a file of ADM's format.

    Args:
        place: the npz.
        pooled_width: of the pooled features.
        spatial_width: of the spatial ones.

    Raises:
        BadInput: the file can't be read, or is no such file, or of other features.
    """
    digest = hashlib.sha256()
    with place.opened() as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
        file.seek(0)
        npz = Npz(file, place.uri)
        pooled = _moments(npz, *POOLED, pooled_width)
        spatial = _moments(npz, *SPATIAL, spatial_width) if SPATIAL[0] in npz else None
    return Reference(digest.hexdigest(), pooled, spatial)


def _moments(npz: Npz, mean_name: str, covariance_name: str, width: int) -> Moments:
    for name, shape in ((mean_name, (width,)), (covariance_name, (width, width))):
        found = npz.known(name).shape
        if found != shape:
            raise BadInput(
                f"{npz.name}: {name} has the shape {found}, not {shape}: it is a reference for "
                "other features"
            )
    mean, covariance = (npz.read(name).astype(np.float64) for name in (mean_name, covariance_name))
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise BadInput(f"{npz.name}: {mean_name} or {covariance_name} holds no finite numbers")
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-6 * scale or (np.diag(covariance) < 0).any():
        raise BadInput(f"{npz.name}: {covariance_name} is no covariance, it isn't symmetric")
    return Moments(mean, covariance)
