"""What samples are compared with: statistics of real images, as ADM publishes them.

Such a file, of which `VIRTUAL_imagenet256_labeled.npz` is one, holds `mu` and `sigma` of the pooled
features of all training images, `mu_s` and `sigma_s` of the spatial ones, and 10,000 images as
`arr_0` (guided-diffusion, evaluations/README.md).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cat_ray.errors import BadInput
from cat_ray.evaluation.distance import Moments
from cat_ray.evaluation.features import POOLED, SPATIAL
from cat_ray.evaluation.npz import IMAGES, Npz
from cat_ray.storage import Location

ARRAYS = {POOLED: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
READ_BYTES = 2**24
# Of the largest entry: rounding makes the smallest eigenvalues a little negative.
INDEFINITE = 1e-3


@dataclass(frozen=True)
class Reference:
    """Statistics of real images.

    Attributes:
        sha256: of the file.
        moments: of the pooled features, and of the spatial ones if file and features have any.
        images: how many images the file holds beside them.
    """

    sha256: str
    moments: Mapping[str, Moments]
    images: int


def read_reference(place: Location, side: int, widths: Mapping[str, int]) -> Reference:
    """The statistics in a file of ADM's format.

    Args:
        place: the npz.
        side: of the images.
        widths: of the features, by name.

    Raises:
        BadInput: the file can't be read, or is no such file, or of other features.
    """
    digest = hashlib.sha256()
    with place.opened() as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
        file.seek(0)
        npz = Npz(file, place.uri)
        moments = {
            name: _moments(npz, *arrays, widths[name])
            for name, arrays in ARRAYS.items()
            if name == POOLED or (name in widths and arrays[0] in npz)
        }
        images = _images(npz, side) if IMAGES in npz else 0
    return Reference(digest.hexdigest(), moments, images)


def _images(npz: Npz, side: int) -> int:
    found = npz.known(IMAGES)
    if (found.dtype, found.shape[1:]) != (np.uint8, (side, side, 3)):
        raise BadInput(
            f"{npz.name}: {IMAGES} is {found.dtype} of the shape {found.shape}, the samples are "
            f"{side} x {side}: it is a reference for other images"
        )
    if found.by_column:
        raise BadInput(
            f"{npz.name}: {IMAGES} doesn't lie image after image: save it as "
            "numpy.ascontiguousarray gives it"
        )
    return found.shape[0]


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
    if np.linalg.eigvalsh(covariance)[0] < -INDEFINITE * scale:
        raise BadInput(f"{npz.name}: {covariance_name} is no covariance, a variance is negative")
    return Moments(mean, covariance)
