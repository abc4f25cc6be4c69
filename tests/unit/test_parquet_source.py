"""Parquet files: whatever columns they have, labelled images come out, or one line says why not."""

import math
import tracemalloc
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cat_ray.data.labels import LARGEST_CLASS
from cat_ray.data.shard_plan import plan_shards
from cat_ray.data.shard_task import read_plan
from cat_ray.data.sources import Encoded, Source, guess_kind, list_units, read_unit
from cat_ray.errors import BadInput, ExpectedError
from cat_ray.storage import locate

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = [b"a", b"b", b"c", b"d"]


def write(path: Path, images: Any, labels: Any, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels}), path, **settings)
    return path


def read(place: Path, pattern: str = "") -> tuple[list[Encoded], Counter[str]]:
    source = Source(guess_kind(locate(str(place)), pattern), locate(str(place)), pattern=pattern)
    left_out = Counter[str]()
    units, _ = list_units(source, left_out)
    return [sample for unit in units for sample in read_unit(source, unit)], left_out


def structs(images: list[bytes]) -> list[dict[str, Any]]:
    return [{"bytes": image, "path": None} for image in images]


@pytest.mark.parametrize(
    "images",
    [
        structs(IMAGES),
        IMAGES,
        pa.array(IMAGES, pa.large_binary()),
        pa.array(IMAGES, pa.binary(1)),
        pa.array(IMAGES).dictionary_encode(),
        pa.array([list(image) for image in IMAGES], pa.list_(pa.uint8())),
        pa.array([list(image) for image in IMAGES], pa.large_list(pa.uint8())),
    ],
)
@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 0, 1],
        [False, True, False, True],
        [0.0, 1.0, -0.0, 1.0],
        ["0", "1", " 0", "+1"],
        pa.array([0, 1, 0, 1], pa.uint8()).dictionary_encode(),
        pa.array([Decimal(0), Decimal(1), Decimal(0), Decimal(1)]),
    ],
)
def test_images_and_class_ids_of_several_types_are_read(tmp_path, images, labels):
    samples, left_out = read(write(tmp_path / "train.parquet", images, labels, row_group_size=3))
    assert [sample.content for sample in samples] == IMAGES
    assert [sample.label for sample in samples] == [0, 1, 0, 1]
    assert not left_out


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["tench", "goldfish", "1", "2"], r"label of type string holds no class id: 'tench'"),
        ([0.0, 1.0, 0.7, 1.9], r"label of type double holds no class id: 0\.7"),
        ([0.0, math.inf, 0.0, 0.0], r"label of type double holds no class id: inf"),
        ([[0], [1], [0, 1], [1]], r"label is of type list<element: int64>, not class ids"),
        ([{"a": 1}] * 4, r"label is of type struct<a: int64>, not class ids"),
        ([b"1"] * 4, "label is of type binary, not class ids"),
        (["1_0", "1", "1", "1"], r"label of type string holds no class id: '1_0'"),
        (["true", "1", "1", "1"], r"label of type string holds no class id: 'true'"),
        ([0, 1, 2, LARGEST_CLASS + 1], r"label of type int64 holds no class id: 1000000 is above"),
        (["9" * 5000, "1", "1", "1"], r"label of type string holds no class id: .* is above"),
    ],
)
def test_labels_that_are_no_class_ids_are_told_before_the_work(tmp_path, labels, told):
    place = write(tmp_path / "train.parquet", structs(IMAGES), labels)
    with pytest.raises(BadInput, match=rf"train\.parquet: column {told}"):
        read(place)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ([f"http://a/{n}.jpg" for n in range(4)], r"of type string, .*URLs must be downloaded"),
        ([{"path": "a.jpg"}] * 4, r"of type struct<path: string>, not encoded images"),
        ([{"bytes": "text"}] * 4, r"of type struct<bytes: string>, not encoded images"),
        ([{"bytes": {"bytes": b"x"}}] * 4, "of type struct<bytes: struct<bytes: binary>>"),
        ([[1, 2], [3], [], [4]], r"of type list<element: int64>, not encoded images"),
        ([1, 2, 3, 4], "of type int64, not encoded images"),
    ],
)
def test_columns_without_encoded_images_are_told_with_their_type(tmp_path, images, told):
    place = write(tmp_path / "train.parquet", images, [0, 1, 0, 1])
    with pytest.raises(BadInput, match=rf"train\.parquet: column image is {told}"):
        read(place)


def test_rows_without_a_class_are_counted_before_the_work(tmp_path):
    images = pa.array([{"bytes": b"a", "path": None}, None, {"bytes": None, "path": "x"}], STRUCT)
    labels = pa.array([math.nan, 1, -1], pa.float64())
    samples, left_out = read(write(tmp_path / "train.parquet", images, labels))
    assert [(sample.label, sample.content) for sample in samples] == [
        (-1, b"a"),
        (1, b""),
        (-1, b""),
    ]
    assert left_out == {"rows without a class": 2}


@pytest.mark.parametrize("image", [{"bytes": None, "path": "x.jpg"}, None])
def test_files_that_hold_only_paths_of_images_are_told_before_the_work(tmp_path, image):
    images = pa.array([image] * 40, STRUCT)
    place = write(tmp_path / "a.parquet", images, [0] * 40, row_group_size=4)
    with pytest.raises(BadInput, match=r"none of 20 rows from all over it has an image in column"):
        read(place)


def test_a_list_with_gaps_is_no_image(tmp_path):
    images = pa.array([[1, None], [2], None, []], pa.list_(pa.uint8()))
    samples, _ = read(write(tmp_path / "train.parquet", images, [0, 1, 0, 1]))
    assert [sample.content for sample in samples] == [b"", b"\x02", b"", b""]
    assert samples[0].problem


def test_a_file_without_rows_may_lie_among_others(tmp_path):
    write(tmp_path / "train-0.parquet", structs(IMAGES), [0, 1, 0, 1])
    write(tmp_path / "train-1.parquet", pa.array([], pa.string()), pa.array([], pa.null()))
    assert len(read(tmp_path)[0]) == 4


def test_a_column_that_comes_twice_is_told(tmp_path):
    twice = pa.table([IMAGES, [0] * 4, [1] * 4], names=["image", "label", "label"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"a\.parquet has 2 columns label"):
        read(tmp_path)


def test_a_cut_file_and_one_that_git_has_not_fetched_are_named(tmp_path):
    whole = write(tmp_path / "whole" / "train.parquet", structs(IMAGES), [0] * 4).read_bytes()
    cut, lfs = tmp_path / "cut.parquet", tmp_path / "lfs.parquet"
    cut.write_bytes(whole[: len(whole) // 2])
    lfs.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    with pytest.raises(BadInput, match=r"cut\.parquet can't be read as Parquet .* get the file ag"):
        read(cut)
    with pytest.raises(BadInput, match=r"lfs\.parquet is a Git LFS pointer.*`git lfs pull`"):
        read(tmp_path)


@pytest.mark.parametrize("labels", [[0, 1], ["cat"] * 4, [[1]] * 4])
def test_a_file_that_changed_since_it_was_listed_is_told(tmp_path, labels):
    place = write(tmp_path / "a.parquet", IMAGES, [0, 1, 0, 1])
    source = Source("parquet", locate(str(place)))
    (unit,), _ = list_units(source)
    write(place, IMAGES[: len(labels)], labels)
    with pytest.raises(BadInput, match=r"a\.parquet"):
        read_unit(source, unit)


# Splits, as the Hub has them.


def hub(root: Path) -> Path:
    for name, label in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1)):
        write(root / "data" / f"{name}.parquet", structs(IMAGES), [label] * 4)
    write(root / "data" / "validation-00000-of-00001.parquet", structs(IMAGES), [0] * 4)
    write(root / "data" / "test-00000-of-00001.parquet", structs(IMAGES), [-1] * 4)
    (root / "README.md").write_text("card")
    return root


def test_several_splits_are_named_with_a_pattern_that_selects_one(tmp_path):
    root = hub(tmp_path / "hub")
    for place, pattern in ((root, "data/train-*.parquet"), (root / "data", "train-*.parquet")):
        with pytest.raises(BadInput) as caught:
            read(place)
        assert "several splits: test, train, validation. " in str(caught.value)
        assert str(caught.value).endswith(f"source.pattern, such as {pattern}")
        samples, left_out = read(place, pattern)
        assert [sample.label for sample in samples] == [0] * 4 + [1] * 4
        assert left_out["not selected by source.pattern"] >= 2


def test_splits_may_be_folders(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "default" / split / "0000.parquet", structs(IMAGES), [0] * 4)
    source = Source("parquet", locate(str(tmp_path)))
    with pytest.raises(BadInput, match=r"such as default/train/\*"):
        list_units(source)
    assert len(read(tmp_path, "default/train/*")[0]) == 4


def test_a_folder_that_is_named_like_a_file_is_read(tmp_path):
    write(tmp_path / "train.parquet" / "part-0000.parquet", structs(IMAGES), [0] * 4)
    assert len(read(tmp_path / "train.parquet")[0]) == 4


# Large row groups.


def test_of_a_row_group_only_what_is_asked_for_is_held(tmp_path):
    """64 images of a mebibyte in one row group go into shards of 8."""
    images = [bytes([number]) * 2**20 for number in range(64)]
    place = write(tmp_path / "a.parquet", structs(images), [0] * 64, data_page_size=2**18)
    source = Source("parquet", locate(str(place)))
    units, _ = list_units(source)
    assert len(units) == 1
    tracemalloc.start()
    seen = []
    for plan in plan_shards(units, 8, seed=0):
        contents = [sample.content for sample in read_plan(source, plan)]
        assert all(len(content) == 2**20 for content in contents)
        seen += [content[0] for content in contents]
        del contents
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(seen) == list(range(64))
    # Not 64: those of a shard, their neighbours, and what is read ahead.
    assert held < 50 * 2**20


@pytest.mark.long
def test_a_row_group_of_more_than_two_gibibytes_is_read(tmp_path):
    rows, image_bytes = 288, 2**23
    # The same few images again and again, so that they are held once.
    few = [
        pa.array([{"bytes": bytes([number]) * image_bytes, "path": None}], STRUCT)
        for number in range(4)
    ]
    images = pa.chunked_array([few[number % 4] for number in range(rows)])
    path = tmp_path / "a.parquet"
    labels = list(range(rows))
    write(path, images, labels, row_group_size=rows, write_batch_size=1, compression="zstd")
    assert pq.ParquetFile(path).num_row_groups == 1
    source = Source("parquet", locate(str(path)))
    units, _ = list_units(source)
    found = 0
    for plan in plan_shards(units, 32, seed=0):
        for sample in read_plan(source, plan):
            assert len(sample.content) == image_bytes
            assert sample.content[0] == sample.label % 4
            found += 1
    assert found == rows


# Any columns.

simple = st.sampled_from(
    [
        *(pa.int8(), pa.int64(), pa.uint8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64()),
        *(pa.bool_(), pa.string(), pa.large_string(), pa.binary(), pa.large_binary()),
        *(pa.binary(3), pa.null(), pa.date32(), pa.timestamp("us"), pa.decimal128(20, 2)),
    ]
)
kinds = st.recursive(
    simple,
    lambda inner: st.one_of(
        inner.map(pa.list_),
        inner.map(pa.large_list),
        st.lists(st.tuples(st.sampled_from(["bytes", "path", "label"]), inner), max_size=3).map(
            lambda fields: pa.struct(dict(fields).items())
        ),
    ),
    max_leaves=3,
)
likely_images = st.sampled_from([STRUCT, pa.binary(), pa.large_binary(), pa.list_(pa.uint8())])
likely_labels = st.sampled_from([pa.int64(), pa.float64(), pa.string(), pa.bool_(), pa.uint64()])
names = st.sampled_from(["image", "label", "image.bytes", "label.x", "text", "é\n", ""])
VALUES: list[Any] = [None, 0, 1, -1, 3, 2**40, 0.5, math.nan, "7", "cat", "1_0", b"abc", True]


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, int]:
    fields = {"image": draw(likely_images | kinds), "label": draw(likely_labels | kinds)}
    fields |= draw(st.dictionaries(names, kinds, max_size=2))
    rows = draw(st.integers(0, 6))
    columns = [pa.array(draw(values(kind, rows)), kind) for kind in fields.values()]
    return pa.table(columns, names=list(fields)), draw(st.integers(1, 4))


def values(kind: pa.DataType, rows: int) -> st.SearchStrategy[list[Any]]:
    """Values that a column of this type can hold, picked from a few that are telling."""
    if pa.types.is_struct(kind):
        row = st.fixed_dictionaries({field.name: one(field.type) for field in kind})
        return st.lists(st.none() | row, min_size=rows, max_size=rows)
    return st.lists(one(kind), min_size=rows, max_size=rows)


def one(kind: pa.DataType) -> st.SearchStrategy[Any]:
    if pa.types.is_struct(kind):
        return st.none() | st.fixed_dictionaries({field.name: one(field.type) for field in kind})
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return st.none() | st.lists(one(kind.value_type), max_size=2)

    def fits(value: Any) -> bool:
        try:
            pa.array([value], kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return False
        return True

    return st.sampled_from([value for value in VALUES if fits(value)])


def check(folder: Path, content: bytes) -> None:
    """Only our own errors come out, and samples are whole."""
    (folder / "a.parquet").write_bytes(content)
    try:
        samples, _ = read(folder)
    except ExpectedError as error:
        assert "\n" not in str(error)
        assert str(folder) in str(error)
        return
    for sample in samples:
        assert isinstance(sample.content, bytes)
        assert sample.label <= LARGEST_CLASS


def check_table(folder: Path, case: tuple[pa.Table, int]) -> None:
    table, rows_together = case
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(table, sink, row_group_size=rows_together)
    except pa.ArrowException:
        # There are types that Parquet doesn't have.
        return
    check(folder, sink.getvalue().to_pybytes())


@settings(max_examples=200, deadline=None)
@given(tables())
def test_of_any_columns_come_samples_or_one_line(tmp_path_factory, case):
    check_table(tmp_path_factory.mktemp("parquet"), case)


@pytest.mark.long
@settings(max_examples=10_000, deadline=None)
@given(tables())
def test_of_ten_thousand_tables_come_samples_or_one_line(tmp_path_factory, case):
    check_table(tmp_path_factory.mktemp("parquet"), case)


def valid_files() -> list[bytes]:
    found = []
    for compression, labels in (("snappy", [0, 1, 0, 1]), ("none", ["0", "1", "0", "1"])):
        sink = pa.BufferOutputStream()
        table = pa.table({"image": structs(IMAGES), "label": labels})
        pq.write_table(table, sink, compression=compression, row_group_size=2)
        found.append(sink.getvalue().to_pybytes())
    return found


VALID = valid_files()
changed_bytes = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4)
damaged = st.tuples(st.sampled_from(VALID), changed_bytes, st.none() | st.integers(0, 2**16))


def damage(case: tuple[bytes, list[tuple[int, int]], int | None]) -> bytes:
    valid, changes, length = case
    content = bytearray(valid)
    for place, value in changes:
        content[place % len(content)] = value
    return bytes(content[: None if length is None else length % len(content)])


@settings(max_examples=200, deadline=None)
@given(damaged)
@example((VALID[0], [], None))
# Arrow ended the process when it was asked for statistics.
@example((VALID[1], [(65536, 59), (1271, 139), (364, 102), (7719, 13)], None))
@example((VALID[0], [(4859, 50), (231, 50)], None))
@example((VALID[0], [(773, 98)], None))
# A field's name with a line's end in it.
@example((VALID[1], [(367, 10)], None))
def test_whatever_is_changed_in_a_file_only_our_own_errors_come_out(tmp_path_factory, case):
    check(tmp_path_factory.mktemp("parquet"), damage(case))


@pytest.mark.long
@settings(max_examples=10_000, deadline=None)
@given(damaged)
def test_whatever_is_changed_in_ten_thousand_files_only_our_own_errors_come_out(
    tmp_path_factory, case
):
    check(tmp_path_factory.mktemp("parquet"), damage(case))


@pytest.mark.parametrize("make", [lambda images: images, structs])
def test_a_few_kilobytes_that_become_gigabytes_are_refused_before_they_do(tmp_path, make):
    write(tmp_path / "a.parquet", make([bytes(3 * 10**8)]), [0], compression="zstd")
    with pytest.raises(BadInput, match=r"has [\d,]+ bytes that become 300,000,\d+, which"):
        read(tmp_path)


def test_of_thousands_of_columns_some_are_named(tmp_path):
    pq.write_table(pa.table({f"column-{n}": [n] for n in range(5000)}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"it has column-0, .*column-19 \.\.\.: set") as caught:
        read(tmp_path)
    assert len(str(caught.value)) < 1000
