"""Ranges of images: the same whoever makes them in whatever order, and their statistics."""

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import scipy.linalg
import torch
from PIL import Image

from cat_ray.data.index import Index, read_index
from cat_ray.data.prepare import digits, prepare
from cat_ray.data.read import Reading, read_images
from cat_ray.errors import BadInput
from cat_ray.evaluation import statistics
from cat_ray.evaluation.copies import Copies, pixels_place, read_pixels
from cat_ray.evaluation.distance import moments
from cat_ray.evaluation.features import Featuriser, grid_means
from cat_ray.evaluation.image_sources import FromNpz, FromShards
from cat_ray.evaluation.measurement import Workers
from cat_ray.evaluation.ranges import STATISTICS, RangeMaker, RangeStore
from cat_ray.evaluation.statistics import (
    distances,
    pooled_features,
    real_moments,
    statistics_of,
)
from cat_ray.section import Storage
from cat_ray.storage import locate

COUNT, SHARD = 2300, 500
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    prepare(digits(str(folder), Storage()))
    return folder


@pytest.fixture(scope="module")
def source(shards: Path) -> FromShards:
    folder = locate(str(shards))
    index = read_index(folder)
    assert {shard.count for shard in index.shards} == {SHARD}
    return FromShards(Reading(folder, "images", 32, 1, crop=False, num_classes=10), index)


@pytest.fixture(scope="module")
def pixels(source: FromShards) -> torch.Tensor:
    """All of them, read another way."""
    images, _ = read_images(source.reading, source.index, COUNT)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def store(folder: Path, source: FromShards, count: int = COUNT) -> RangeStore:
    return RangeStore(locate(str(folder)), source, Featuriser("pixels"), count)


def made(own: RangeStore, order: list[int]) -> RangeStore:
    maker = RangeMaker(own, Workers())
    for number in order:
        numbers = own.ranges()[number]
        maker({"start": numbers.start, "stop": numbers.stop})
    return own


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "numbers", [range(1), range(3, 40), range(490, 510), range(499, 1501), range(COUNT)]
)
def test_real_images_have_the_numbers_of_their_order_in_the_shards(source, pixels, numbers):
    found = source.load(CPU)(numbers).pixels
    assert torch.equal(found, pixels[numbers.start : numbers.stop])


def test_a_source_is_known_by_its_samples_not_by_its_place(source):
    moved = FromShards(
        Reading(locate("elsewhere"), "images", 32, 1, crop=False, num_classes=10), source.index
    )
    assert moved.identity() == source.identity()
    assert isinstance(source.index, Index)
    other = FromShards(
        Reading(locate("elsewhere"), "images", 64, 1, crop=True, num_classes=10), source.index
    )
    assert other.identity() != source.identity()


def test_the_order_of_the_ranges_changes_no_byte(source, tmp_path):
    for name, order in (("one", [0, 1, 2]), ("other", [2, 0, 1])):
        made(store(tmp_path / name, source), order)
    assert len(content(tmp_path / "one")) == 3
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_statistics_are_those_of_all_features_at_once(source, pixels, tmp_path):
    found = statistics_of(made(store(tmp_path, source), [1, 0, 2]))
    exact = moments(grid_means(pixels).numpy())
    pooled = found.moments["pooled"]
    np.testing.assert_allclose(pooled.mean, exact.mean, rtol=1e-12)
    np.testing.assert_allclose(pooled.covariance, exact.covariance, rtol=1e-9, atol=1e-15)
    assert (list(found.moments), found.score, found.figures) == (["pooled"], None, {})
    assert distances(found, {"pooled": exact})["frechet"] == pytest.approx(0, abs=1e-6)


def test_other_pixels_have_another_hash_though_their_features_are_alike(source, tmp_path):
    whole = statistics_of(made(store(tmp_path / "a", source), [0, 1, 2]))
    again = statistics_of(made(store(tmp_path / "b", source), [0, 1, 2]))
    fewer = statistics_of(made(store(tmp_path / "c", source, COUNT - 1), [0, 1, 2]))
    assert whole.pixels_sha256 == again.pixels_sha256 != fewer.pixels_sha256


def adms_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """As ADM's evaluator takes it of activations, for FID and sFID alike."""
    (mean, covariance), (other, others) = (
        (values.mean(axis=0), np.cov(values, rowvar=False)) for values in (ours, theirs)
    )
    root = scipy.linalg.sqrtm(covariance @ others).real
    return np.square(mean - other).sum() + np.trace(covariance + others - 2 * root)


def test_fid_and_sfid_are_adms_on_pooled_and_on_spatial_features(source, tmp_path):
    random = np.random.default_rng(0)
    sets = []
    for name, shift in (("samples", 0.3), ("reals", 0.0)):
        own = store(tmp_path / name, source)
        parts = []
        for numbers in own.ranges():
            features = {
                "pooled": random.normal(size=(len(numbers), 6)) + shift,
                "spatial": random.gamma(2.0, size=(len(numbers), 14)) * (1 + shift),
            }
            features = {what: values.astype(np.float32) for what, values in features.items()}
            content = safetensors.numpy.save(features, {"pixels_sha256": "0"})
            own.place(numbers).write(content)
            parts.append(features)
        whole = {what: np.concatenate([part[what] for part in parts]) for what in parts[0]}
        sets.append((statistics_of(own), {w: v.astype(np.float64) for w, v in whole.items()}))
    (samples, ours), (reals, theirs) = sets
    found = distances(samples, reals.moments)
    for name, what in (("frechet", "pooled"), ("spatial_frechet", "spatial")):
        assert found[name] == pytest.approx(adms_distance(ours[what], theirs[what]), rel=1e-9)


def test_real_moments_are_kept_and_most_ranges_go(source, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "KEPT_RANGES", 1)
    own = made(store(tmp_path, source), [0, 1, 2])
    exact = statistics_of(own).moments["pooled"]
    first = real_moments(own)["pooled"]
    assert sorted(content(tmp_path)) == [own.place(own.ranges()[0]).name, STATISTICS]
    for found in (first, real_moments(own)["pooled"]):
        np.testing.assert_array_equal(found.mean, exact.mean)
        np.testing.assert_array_equal(found.covariance, exact.covariance)
    pooled = pooled_features(own, 1)
    assert (pooled.shape, pooled.dtype) == ((1000, 64), np.float64)


def test_an_npzs_images_have_the_numbers_of_their_rows(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", images)
    place = locate(f"{tmp_path}/reference.npz")
    own = FromNpz(place, "digest", 3)
    for numbers in (range(1000), range(1000, 2000), range(2000, COUNT)):
        expected = images[numbers.start : numbers.stop].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(own.load(CPU)(numbers).pixels, expected)
    grey = FromNpz(place, "digest", 1).load(CPU)(range(1000)).pixels
    np.testing.assert_array_equal(grey[:, 0], images[:1000, :, :, 0])


def test_copies_are_the_images_themselves(source, pixels, tmp_path):
    place = locate(str(tmp_path))
    copies = Copies(pixels=1, png=place / "png", shards=place / "shards")
    own = replace(store(tmp_path / "ranges", source, 1100), copies=copies)
    made(own, [1, 0])
    assert own.due() == []
    assert torch.equal(read_pixels(own.folder, range(1000)), pixels[:1000])
    assert not pixels_place(own.folder, range(1000, 1100)).exists()
    files = sorted((tmp_path / "png").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(1100)]
    for number in (0, 999, 1000, 1099):
        np.testing.assert_array_equal(np.asarray(Image.open(files[number])), pixels[number, 0])
    labels = source.load(CPU)(range(1100)).labels
    with tarfile.open(tmp_path / "shards" / "samples-000001000.tar") as shard:
        assert len(shard.getnames()) == 200
        held = shard.extractfile("000001003.cls"), shard.extractfile("000001003.png")
        assert int(held[0].read()) == labels[1003]
        np.testing.assert_array_equal(np.asarray(Image.open(held[1])), pixels[1003, 0])


def test_a_damaged_range_is_named(source, tmp_path):
    own = made(store(tmp_path, source), [0, 1, 2])
    own.place(own.ranges()[1]).write(b"cut short")
    with pytest.raises(BadInput, match=r"images-000001000-000002000.* is damaged: delete it"):
        statistics_of(own)
