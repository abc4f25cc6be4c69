"""Ranges of images: the same whoever makes them in whatever order, and their statistics."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cat_ray.data.index import Index, read_index
from cat_ray.data.prepare import digits, prepare
from cat_ray.data.read import Reading, read_images
from cat_ray.errors import BadInput
from cat_ray.evaluation.distance import moments
from cat_ray.evaluation.features import Featuriser, grid_means
from cat_ray.evaluation.image_sources import FromShards
from cat_ray.evaluation.measurement import Workers
from cat_ray.evaluation.precision_recall import Balls
from cat_ray.evaluation.ranges import RangeMaker, RangeStore
from cat_ray.evaluation.statistics import distances, precision_and_recall, statistics_of
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
    found = source.load(CPU)(numbers)
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
    np.testing.assert_allclose(found.pooled.mean, exact.mean, rtol=1e-12)
    np.testing.assert_allclose(found.pooled.covariance, exact.covariance, rtol=1e-9, atol=1e-15)
    assert (found.spatial, found.score) == (None, None)
    assert distances(found, exact, None)["frechet"] == pytest.approx(0, abs=1e-6)


def test_other_pixels_have_another_hash_though_their_features_are_alike(source, tmp_path):
    whole = statistics_of(made(store(tmp_path / "a", source), [0, 1, 2]))
    again = statistics_of(made(store(tmp_path / "b", source), [0, 1, 2]))
    fewer = statistics_of(made(store(tmp_path / "c", source, COUNT - 1), [0, 1, 2]))
    assert whole.pixels_sha256 == again.pixels_sha256 != fewer.pixels_sha256


def test_precision_and_recall_are_on_the_features_of_both(source, pixels, tmp_path):
    reals, samples = (store(tmp_path / str(count), source, count) for count in (600, 900))
    found = precision_and_recall(made(samples, [0]), made(reals, [0]))
    real, sample = grid_means(pixels[:600]).double(), grid_means(pixels[:900]).double()
    assert found == {
        "precision": Balls.round(real).share_inside(sample),
        "recall": Balls.round(sample).share_inside(real),
    }
    assert found["recall"] == 1.0 and 0.5 < found["precision"] < 1.0


def test_a_damaged_range_is_named(source, tmp_path):
    own = made(store(tmp_path, source), [0, 1, 2])
    own.place(own.ranges()[1]).write(b"cut short")
    with pytest.raises(BadInput, match=r"images-000001000-000002000.* is damaged: delete it"):
        statistics_of(own)
