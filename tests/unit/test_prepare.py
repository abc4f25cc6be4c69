"""The digits as WebDataset shards: complete, the same every time, indexed last."""

import hashlib
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from cat_ray.data import prepare as module
from cat_ray.data.decode import RawSample, decode_sample
from cat_ray.data.index import INDEX_NAME, Index, check_shards, read_index
from cat_ray.data.prepare import Source, mnist, prepare
from cat_ray.data.read import read_shard
from cat_ray.errors import BadInput
from cat_ray.storage import Location, locate

Prepared = tuple[Location, Index]


@pytest.fixture(scope="module")
def source() -> Source:
    return mnist()


@pytest.fixture(scope="module")
def prepared(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(module.SOURCES, "mnist", lambda: source)
        folder = locate(str(tmp_path_factory.mktemp("digits")))
        return folder, prepare("mnist", folder)


@pytest.fixture(scope="module")
def samples(prepared: Prepared) -> list[RawSample]:
    folder, index = prepared
    return [sample for shard in index.shards for sample in read_shard(folder, shard)]


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> Source:
    """A source of 20 images that takes no time, in place of the digits."""
    images = np.arange(20 * 16, dtype=np.uint16).reshape(20, 4, 4).astype(np.uint8)
    source = Source("few", images, np.arange(20) % 3)
    monkeypatch.setitem(module.SOURCES, "mnist", lambda: source)
    return source


def content(folder: Location) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder.path).iterdir()}


def test_the_same_source_gives_the_same_bytes(prepared, source, tmp_path, monkeypatch):
    monkeypatch.setitem(module.SOURCES, "mnist", lambda: source)
    # On another day.
    monkeypatch.setattr("time.time", lambda: 1.0)
    again = locate(str(tmp_path))
    prepare("mnist", again)
    assert content(again) == content(prepared[0])


def test_the_index_tells_what_lies_there(prepared):
    folder, index = prepared
    assert read_index(folder) == index
    check_shards(index, folder)
    assert (index.images, index.resolution, index.channels) == (5000, 32, 1)
    assert index.class_counts == (500,) * 10
    assert sorted(content(folder)) == sorted([INDEX_NAME, *(s.name for s in index.shards)])
    for shard in index.shards:
        assert hashlib.sha256((folder / shard.name).read()).hexdigest() == shard.sha256


def test_each_digit_is_there_once_with_its_class(samples, source):
    assert len(source.labels) == 5000
    keys = Counter(sample.key for sample in samples)
    assert keys == Counter(f"{n:08d}" for n in range(5000))
    labels = [int(sample.members["cls"]) for sample in samples]
    assert labels == [source.labels[int(sample.key)] for sample in samples]
    assert Counter(labels) == {label: 500 for label in range(10)}


def test_a_digit_is_kept_exactly_and_padded_with_black(samples, source):
    for sample in samples[::50]:
        image, label = decode_sample(sample, channels=1, resolution=32, num_classes=10)
        assert np.array_equal(image[0], source.images[int(sample.key)])
        assert label == source.labels[int(sample.key)]
    assert source.images[:, 2:30, 2:30].any(axis=(1, 2)).all()
    frame = source.images.copy()
    frame[:, 2:30, 2:30] = 0
    assert not frame.any()


def test_the_digits_are_shuffled_over_the_shards(prepared, samples):
    # The source has them class by class.
    for first in range(0, 5000, 500):
        labels = Counter(int(sample.members["cls"]) for sample in samples[first : first + 500])
        assert min(labels[label] for label in range(10)) > 20


def test_the_webdataset_library_reads_the_shards(prepared, samples):
    folder, index = prepared
    place = str(Path(folder.path) / index.shards[3].name)
    read = list(webdataset.WebDataset(place, shardshuffle=False).decode("l8"))
    expected = samples[1500:2000]
    assert [row["__key__"] for row in read] == [sample.key for sample in expected]
    for row, sample in zip(read, expected, strict=True):
        image, label = decode_sample(sample, channels=1, resolution=32, num_classes=10)
        assert row["cls"] == label
        assert np.array_equal(row["png"], image[0])


def test_no_name_and_no_time_of_the_maker_is_in_a_shard(few_digits, tmp_path):
    folder = locate(str(tmp_path))
    prepare("mnist", folder)
    with tarfile.open(tmp_path / "train-000000.tar") as archive:
        entries = archive.getmembers()
    assert len(entries) == 40
    assert {(e.mtime, e.uname, e.gname) for e in entries} == {(0, "", "")}


@pytest.mark.parametrize(("shard_images", "counts"), [(20, [20]), (8, [8, 8, 4]), (50, [20])])
def test_shards_have_the_size_that_was_asked_for(few_digits, tmp_path, shard_images, counts):
    folder = locate(str(tmp_path))
    index = prepare("mnist", folder, shard_images)
    assert [shard.count for shard in index.shards] == counts
    assert [len(read_shard(folder, shard)) for shard in index.shards] == counts
    assert index.class_counts == (7, 7, 6)


def test_colour_images_have_three_channels(few_digits, tmp_path, monkeypatch):
    colour = Source("colour", np.stack([few_digits.images] * 3, axis=3), few_digits.labels)
    monkeypatch.setitem(module.SOURCES, "mnist", lambda: colour)
    folder = locate(str(tmp_path))
    index = prepare("mnist", folder)
    assert (index.channels, index.resolution) == (3, 4)
    sample = read_shard(folder, index.shards[0])[0]
    image, _ = decode_sample(sample, 3, 4, 3)
    assert np.array_equal(image.transpose(1, 2, 0), colour.images[int(sample.key)])


def test_a_prepared_folder_is_refused_and_left_alone(few_digits, tmp_path):
    folder = locate(str(tmp_path))
    prepare("mnist", folder)
    before = content(folder)
    with pytest.raises(BadInput, match=re.escape(f"{folder.uri} holds prepared shards already")):
        prepare("mnist", folder, shard_images=3)
    assert content(folder) == before


def test_a_source_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    with pytest.raises(BadInput, match="no source named imagnet: there is mnist"):
        prepare("imagnet", locate(str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("uploads", [0, 1, 2, 3])
def test_a_kill_leaves_no_index_and_the_next_call_finishes(
    few_digits, tmp_path, monkeypatch, uploads
):
    whole, killed = locate(str(tmp_path / "whole")), locate(str(tmp_path / "killed"))
    prepare("mnist", whole, 7)
    done = []

    def until_killed(act):
        def wrapped(place: Location, content: bytes | Path) -> None:
            if len(done) == uploads:
                raise KeyboardInterrupt
            act(place, content)
            done.append(place.name)

        return wrapped

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Location, "upload", until_killed(Location.upload))
        patched.setattr(Location, "write", until_killed(Location.write))
        prepare("mnist", killed, 7)
    assert INDEX_NAME not in done
    with pytest.raises(BadInput, match=r"has no index\.json"):
        read_index(killed)
    prepare("mnist", killed, 7)
    assert content(killed) == content(whole)


def test_a_png_in_a_shard_is_an_image_file(prepared, samples, tmp_path):
    path = tmp_path / "digit.png"
    path.write_bytes(samples[0].members["png"])
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))
