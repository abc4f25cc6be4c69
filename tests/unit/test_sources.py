"""Whatever form people have their images in: the same labelled images come out."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from pyarrow import fs

from cat_ray.data import sources as module
from cat_ray.data.carried import CROPS, mnist, photographs
from cat_ray.data.sources import (
    Encoded,
    Source,
    Unit,
    blocks_of,
    guess_kind,
    list_units,
    read_unit,
)
from cat_ray.errors import BadInput
from cat_ray.storage import Location, locate

CLASSES = ("cat", "dog", "eel")
PER_CLASS = 7


def encoded(value: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (9, 7), (value, 2 * value, 255 - value)).save(content, format="JPEG")
    return content.getvalue()


# Class id and file content, each different.
LABELLED = [(label, encoded(PER_CLASS * label + n)) for label in range(3) for n in range(PER_CLASS)]


def tar(members: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def class_tars() -> dict[str, bytes]:
    return {
        f"{name}.tar": tar(
            {f"{name}_{n}.JPEG": c for n, (label, c) in enumerate(LABELLED) if label == place}
        )
        for place, name in enumerate(CLASSES)
    }


def folders(root: Path) -> Path:
    for number, (label, content) in enumerate(LABELLED):
        # Deeper folders belong to the class of the outermost one.
        name = f"{CLASSES[label]}/{'deep/' if number % 3 == 0 else ''}{number}.v2.JPEG"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        (root / CLASSES[label] / "README.txt").write_text("no image")
    (root / "LICENSE").write_text("no class")
    return root


def tar_of_tars(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    # In another order than that of their names.
    (root / "train.tar").write_bytes(tar(dict(reversed(class_tars().items()))))
    return root / "train.tar"


def folder_of_tars(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    for name, content in class_tars().items():
        (root / name).write_bytes(content)
    return root


def webdataset(root: Path, label: Callable[[int], tuple[str, bytes]], shards: int) -> Path:
    root.mkdir(exist_ok=True)
    for shard in range(shards):
        members = {}
        for number, (of, content) in enumerate(LABELLED[shard::shards]):
            ending, text = label(of)
            members |= {f"{number:04d}.jpg": content, f"{number:04d}.{ending}": text}
        (root / f"{shard:03d}.tar").write_bytes(tar(members))
    return root


def in_cls(label: int) -> tuple[str, bytes]:
    return "cls", str(label).encode()


def in_json(label: int) -> tuple[str, bytes]:
    return "json", json.dumps({"caption": "a cat", "label": label}).encode()


def parquet(root: Path, as_struct: bool = True) -> Path:
    root.mkdir(exist_ok=True)
    for number in range(2):
        rows = LABELLED[number::2]
        images = [{"bytes": c, "path": None} if as_struct else c for _, c in rows]
        table = pyarrow.table({"image": images, "label": [label for label, _ in rows]})
        pyarrow.parquet.write_table(table, root / f"train-{number}.parquet", row_group_size=4)
    return root


LAYOUTS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "class folders": ("folders", folders),
    "a tar of tars": ("tars", tar_of_tars),
    "a folder of tars": ("tars", folder_of_tars),
    "webdataset with cls": ("webdataset", lambda root: webdataset(root, in_cls, 2)),
    "webdataset with json": ("webdataset", lambda root: webdataset(root, in_json, 2)),
    "one webdataset tar": ("webdataset", lambda root: webdataset(root, in_cls, 1) / "000.tar"),
    "Hugging Face's Parquet": ("parquet", parquet),
    "Parquet of bytes": ("parquet", lambda root: parquet(root, as_struct=False)),
    "one Parquet file": ("parquet", lambda root: parquet(root) / "train-0.parquet"),
}
WHOLE = [name for name in LAYOUTS if name != "one Parquet file"]


def everything(source: Source) -> list[Encoded]:
    units, _ = list_units(source)
    found = [read_unit(source, unit) for unit in units]
    assert [len(samples) for samples in found] == [unit.count for unit in units]
    return [sample for samples in found for sample in samples]


def remote(path: Path) -> Location:
    """The same on a filesystem that isn't this machine's, as an object store is."""
    store = fs.SubTreeFileSystem(str(path.parent), fs.LocalFileSystem())
    return Location(store, path.name, f"s3://bucket/{path.name}")


@pytest.mark.parametrize("layout", WHOLE)
@pytest.mark.parametrize("where", ["here", "in a store"])
def test_each_layout_gives_the_same_labelled_images(layout, where, tmp_path):
    kind, make = LAYOUTS[layout]
    path = make(tmp_path / "set")
    found = everything(Source(kind, locate(str(path)) if where == "here" else remote(path)))
    assert sorted((sample.label, sample.content) for sample in found) == sorted(LABELLED)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_told_by_looking_at_it(layout, tmp_path):
    kind, make = LAYOUTS[layout]
    path = make(tmp_path / "set")
    assert guess_kind(locate(str(path))) == guess_kind(remote(path)) == kind


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_sample_has_a_name_of_its_own_that_a_shard_can_hold(layout, tmp_path):
    kind, make = LAYOUTS[layout]
    keys = [sample.key for sample in everything(Source(kind, locate(str(make(tmp_path / "set")))))]
    assert len(set(keys)) == len(keys)
    # Neighbours of one name, or a dot in it, would make other samples of them.
    assert not any("." in key.rpartition("/")[2] for key in keys)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_units_come_in_the_same_order_each_time(layout, tmp_path):
    kind, make = LAYOUTS[layout]
    source = Source(kind, locate(str(make(tmp_path / "set"))))
    assert list_units(source) == list_units(source)


@pytest.mark.parametrize("layout", ["class folders", "a tar of tars", "a folder of tars"])
def test_classes_are_numbered_by_their_names(layout, tmp_path):
    kind, make = LAYOUTS[layout]
    _, classes = list_units(Source(kind, locate(str(make(tmp_path / "set")))))
    assert classes == CLASSES


# Nothing there, or not as it was.


def test_a_place_that_holds_nothing_of_the_kind_is_told_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    place = locate(str(tmp_path))
    with pytest.raises(BadInput, match="holds no class folders, tar files or Parquet files"):
        guess_kind(place)
    for kind in ("folders", "tars", "webdataset", "parquet"):
        with pytest.raises(BadInput, match=f"{place.uri} holds no samples of the kind {kind}"):
            list_units(Source(kind, place))


def test_a_tar_in_a_set_that_breaks_off_is_told_by_name(tmp_path):
    webdataset(tmp_path, in_cls, 2)
    content = (tmp_path / "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(content[:3000])
    with pytest.raises(BadInput, match=r"001\.tar is not a whole tar file"):
        list_units(Source("webdataset", locate(str(tmp_path))))


@pytest.mark.parametrize(
    "members",
    [
        {"0.jpg": b"x"},
        {"0.cls": b"1"},
        {"0.jpg": b"x", "0.cls": b"cat"},
        {"0.jpg": b"x", "0.json": b"{"},
        {"0.jpg": b"x", "0.json": b"3"},
        {"0.txt": b"x"},
    ],
)
def test_a_sample_without_image_or_class_comes_empty_for_who_decodes_it(tmp_path, members):
    good = {"1.jpg": LABELLED[0][1], "1.cls": b"0"}
    (tmp_path / "0.tar").write_bytes(tar(members | good))
    broken, whole = everything(Source("webdataset", locate(f"{tmp_path}/0.tar")))
    assert (broken.label, broken.content) == (-1, b"")
    assert (whole.label, whole.content) == LABELLED[0]


def test_parquet_columns_of_other_names_can_be_told_and_wrong_ones_are(tmp_path):
    table = pyarrow.table({"img": [{"bytes": b"x", "path": None}], "fine_label": [3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    place = locate(str(tmp_path))
    (sample,) = everything(Source("parquet", place, "img", "fine_label"))
    assert (sample.label, sample.content) == (3, b"x")
    with pytest.raises(BadInput, match="no column image or label, it has img, fine_label"):
        everything(Source("parquet", place))


def test_a_row_of_parquet_without_image_or_label_comes_empty(tmp_path):
    images = [{"bytes": b"x", "path": None}, {"bytes": None, "path": "a.jpg"}, None]
    table = pyarrow.table({"image": images, "label": pyarrow.array([None, 1, 2], pyarrow.int64())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = everything(Source("parquet", locate(str(tmp_path))))
    assert [(s.label, s.content) for s in found] == [(-1, b"x"), (1, b""), (2, b"")]


# What packages carry.


def test_digits_come_as_files_of_their_pixels():
    source = Source("mnist", locate("."))
    units, classes = list_units(source)
    assert (len(units), classes) == (5000, tuple("0123456789"))
    for number in (0, 1234, 4999):
        (sample,) = read_unit(source, units[number])
        assert sample.label == mnist()[1][number]
        with Image.open(io.BytesIO(sample.content)) as image:
            assert np.array_equal(np.asarray(image), mnist()[0][number])


@pytest.mark.parametrize("crops", CROPS)
def test_a_crop_of_a_photograph_is_the_same_each_time_and_lies_in_it(crops):
    source = Source("photographs", locate("."), crops=crops)
    units, _ = list_units(source)
    width, height, _ = CROPS[crops]
    assert len(units) == 20_000
    for number in (0, 1, 19_999):
        assert read_unit(source, units[number]) == read_unit(source, units[number])
        (sample,) = read_unit(source, units[number])
        with Image.open(io.BytesIO(sample.content)) as image:
            assert image.size == (width, height)
            mean = np.asarray(image).mean()
        assert abs(mean - photographs()[number % 2].mean()) < 80
    assert read_unit(source, units[0]) != read_unit(source, units[2])


# Samples that are read together.


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        ([0], []),
        ([0, 5], [(0, 5, 1)]),
        ([0, 5, 10], [(0, 10, 2)]),
        ([0, 5, 10, 12], [(0, 10, 2), (10, 12, 1)]),
        ([0, 30, 35, 50], [(0, 30, 1), (30, 50, 2)]),
        ([512, 519, 530], [(512, 530, 2)]),
        ([0, 10, 20, 30], [(0, 10, 1), (10, 20, 1), (20, 30, 1)]),
    ],
)
def test_neighbours_are_read_together_until_they_are_a_block(monkeypatch, extents, expected):
    monkeypatch.setattr(module, "BLOCK_BYTES", 10)
    assert list(blocks_of(extents)) == expected


def test_a_unit_of_a_large_tar_is_some_of_its_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 5000)
    place = locate(str(webdataset(tmp_path, in_cls, 2)))
    units, _ = list_units(Source("webdataset", place))
    assert len(units) > 4
    assert all(isinstance(unit, Unit) and unit.label == -1 for unit in units)
    found = everything(Source("webdataset", place))
    assert sorted((sample.label, sample.content) for sample in found) == sorted(LABELLED)
