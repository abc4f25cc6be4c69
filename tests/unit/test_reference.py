"""Statistics of real images as ADM publishes them, and files that are something else."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cat_ray.errors import BadInput
from cat_ray.evaluation.reference import read_reference
from cat_ray.storage import locate

WIDTH, SPATIAL, SIDE = 5, 3, 4
WIDTHS = {"pooled": WIDTH, "spatial": SPATIAL}


def covariance(width: int) -> np.ndarray:
    mix = np.random.default_rng(width).normal(size=(width, width))
    return mix @ mix.T


def arrays() -> dict[str, np.ndarray]:
    return {
        "arr_0": np.zeros((2, 4, 4, 3), np.uint8),
        "mu": np.arange(WIDTH, dtype=np.float64),
        "sigma": covariance(WIDTH),
        "mu_s": np.arange(SPATIAL, dtype=np.float32),
        "sigma_s": covariance(SPATIAL),
    }


def saved(folder: Path, values: dict[str, np.ndarray]) -> Path:
    np.savez(folder / "reference.npz", **values)
    return folder / "reference.npz"


def test_both_moments_come_with_the_files_hash(tmp_path):
    path = saved(tmp_path, arrays())
    found = read_reference(locate(str(path)), SIDE, WIDTHS)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    pooled, spatial = found.moments["pooled"], found.moments["spatial"]
    np.testing.assert_array_equal(pooled.mean, np.arange(WIDTH))
    np.testing.assert_array_equal(pooled.covariance, covariance(WIDTH))
    np.testing.assert_array_equal(spatial.mean, np.arange(SPATIAL))
    assert spatial.mean.dtype == np.float64
    assert found.images == 2


def test_a_file_needs_no_spatial_features(tmp_path):
    values = arrays()
    del values["mu_s"], values["sigma_s"]
    assert list(read_reference(locate(str(saved(tmp_path, values))), SIDE, WIDTHS).moments) == [
        "pooled"
    ]


def test_features_need_not_be_spatial(tmp_path):
    place = locate(str(saved(tmp_path, arrays())))
    assert list(read_reference(place, SIDE, {"pooled": WIDTH}).moments) == ["pooled"]


def test_a_file_needs_no_images(tmp_path):
    values = arrays()
    del values["arr_0"]
    assert read_reference(locate(str(saved(tmp_path, values))), SIDE, WIDTHS).images == 0


def test_other_arrays_and_fortrans_order_do_not_matter(tmp_path):
    values = arrays()
    values["sigma"] = np.asfortranarray(values["sigma"])
    values |= {
        "names": np.asarray([{}], dtype=object),
        "count": np.asarray(3),
        "cls": np.asarray("a"),
    }
    found = read_reference(locate(str(saved(tmp_path, values))), SIDE, WIDTHS)
    np.testing.assert_array_equal(found.moments["pooled"].covariance, covariance(WIDTH))
    assert found.images == 2


skewed = covariance(WIDTH)
skewed[0, 1] += 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mu": np.zeros(4)}, r"mu has the shape \(4,\), not \(5,\): .* other features"),
        ({"sigma": covariance(4)}, r"sigma has the shape \(4, 4\), not \(5, 5\)"),
        ({"sigma": np.zeros(5)}, r"sigma has the shape \(5,\), not \(5, 5\)"),
        ({"mu_s": np.zeros(4)}, r"mu_s has the shape \(4,\), not \(3,\)"),
        ({"mu": np.full(WIDTH, np.nan)}, "mu or sigma holds no finite numbers"),
        ({"sigma": covariance(WIDTH) * np.inf}, "mu or sigma holds no finite numbers"),
        ({"sigma": skewed}, "sigma is no covariance"),
        ({"sigma": -covariance(WIDTH)}, "sigma is no covariance"),
        ({"sigma": np.ones((WIDTH, WIDTH)) - np.eye(WIDTH)}, "a variance is negative"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, r"\(2, 8, 8, 3\), the samples are 4 x 4"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))}, "image after image: save"),
        ({"mu": np.asarray(["a"] * WIDTH)}, r"mu\.npy holds no plain numbers"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "arr_0 is float64 .*: it is a reference for other"),
    ],
)
def test_other_statistics_are_refused(tmp_path, changes, told):
    path = saved(tmp_path, arrays() | changes)
    with pytest.raises(BadInput, match=told):
        read_reference(locate(str(path)), SIDE, WIDTHS)


@pytest.mark.parametrize("missing", ["mu", "sigma", "sigma_s"])
def test_a_file_without_statistics_is_refused(tmp_path, missing):
    values = arrays()
    del values[missing]
    with pytest.raises(BadInput, match=f"has no {missing}, it has arr_0"):
        read_reference(locate(str(saved(tmp_path, values))), SIDE, WIDTHS)


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_what_was_cut_short_is_no_npz(tmp_path, content):
    (tmp_path / "reference.npz").write_bytes(content)
    with pytest.raises(BadInput, match=r"reference\.npz is no npz file"):
        read_reference(locate(f"{tmp_path}/reference.npz"), SIDE, WIDTHS)


def test_a_file_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="doesn't exist"):
        read_reference(locate(str(tmp_path / "absent.npz")), SIDE, WIDTHS)
