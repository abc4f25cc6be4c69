"""Records of a checkpoint: what is written is read, what is damaged is noticed, parts add up."""

import json
import math
import random
import string
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cat_ray.checkpoint.layout import (
    folder_name,
    part_file,
    slice_file,
)
from cat_ray.checkpoint.records import FORMAT, FileRecord, Part, SliceRecord, join, parse_part
from cat_ray.errors import BadInput

WORKERS = 4
few = settings(max_examples=100, deadline=None, derandomize=True)


def piece(offset: int, length: int, group: str = "generator", tensor: str = "weight"):
    """A slice of a tensor of 15 elements."""
    return SliceRecord(group, tensor, (3, 5), offset, length, "a file")


def part(*slices: SliceRecord) -> Part:
    return Part((), slices)


SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.tuples(
        st.sampled_from(["generator", "discriminator"]),
        st.text(min_size=1, max_size=3).filter(str.isprintable),
    ),
    SHAPES,
    min_size=1,
    max_size=5,
)


@st.composite
def parts_of_workers(draw) -> list[Part]:
    """Tensors cut anywhere, the pieces dealt to workers anyhow."""
    held: list[list[SliceRecord]] = [[] for _ in range(WORKERS)]
    for (group, tensor), shape in draw(TENSORS).items():
        count = math.prod(shape)
        cuts = draw(st.sets(st.integers(1, count), max_size=3))
        ends = sorted({0, count, *cuts})
        for first, beyond in pairwise(ends):
            rank = draw(st.integers(0, WORKERS - 1))
            file = slice_file(group, rank, WORKERS)
            held[rank].append(SliceRecord(group, tensor, shape, first, beyond - first, file))
    return [
        Part(tuple(FileRecord(name, 1, "0") for name in {s.file for s in slices}), tuple(slices))
        for slices in held
    ]


# Names.


@few
@given(
    st.integers(0, 10**12 - 1), st.integers(0, 10**12 - 1), st.text(string.hexdigits, min_size=1)
)
def test_names_sort_as_the_images_do_whichever_group_saved(one, other, group):
    assume(one != other)
    assert (folder_name(one, group) < folder_name(other, "3f9a1c")) == (one < other)


def test_groups_and_workers_have_folders_and_files_of_their_own():
    assert folder_name(32, "one") != folder_name(32, "other")
    names = {slice_file(group, rank, 12) for group in ("a", "a.moments") for rank in range(12)}
    names |= {part_file(rank, 12) for rank in range(12)}
    assert len(names) == 36


# Parts and manifests as files.


@few
@given(parts_of_workers())
def test_a_part_is_read_as_it_was_written(parts):
    for written in parts:
        read = parse_part(written.to_json())
        assert read.files == written.files
        assert set(read.slices) == set(written.slices)


NOTHING = json.dumps({"format": FORMAT, "files": [], "tensors": {}}).encode()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"3", b'"format"', b"{}", b"\xff\xfe", NOTHING]
)
def test_what_is_no_part_is_refused(content):
    with pytest.raises(ValueError):
        parse_part(content)


@pytest.mark.parametrize("bit", [1, 2, 4, 32])
def test_no_flipped_bit_makes_another_part(bit):
    written = Part((FileRecord("a", 12, "0f"),), (piece(0, 8), piece(8, 7)))
    content = written.to_json()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= bit
        try:
            assert parse_part(bytes(damaged)) == written, content[place - 20 : place + 20]
        except ValueError:
            continue


@pytest.mark.parametrize("found", [FORMAT - 1, FORMAT + 1])
def test_another_format_is_told_with_the_one_that_is_read(found):
    with pytest.raises(BadInput, match=f"has format {found}, this version reads {FORMAT}"):
        parse_part(json.dumps({"format": found, "files": []}).encode())


# All workers' parts together.


@few
@given(parts_of_workers(), st.randoms())
def test_parts_make_the_same_manifest_in_whatever_order_they_come(parts, numbers: random.Random):
    manifest = join(parts)
    assert set(manifest.slices) == {s for found in parts for s in found.slices}
    assert set(manifest.files) == {record for found in parts for record in found.files}
    numbers.shuffle(parts)
    assert join(parts).to_json() == manifest.to_json()
    assert parse_part(manifest.to_json()) == manifest


@few
@given(parts_of_workers(), st.data())
def test_a_piece_that_is_missing_or_there_twice_is_refused_by_name(parts, data):
    pieces = [s for found in parts for s in found.slices]
    one = data.draw(st.sampled_from(pieces))
    with pytest.raises(ValueError) as caught:
        join([*parts, part(one)])
    assert str(caught.value).startswith(f"{one.group}: {one.tensor} ")

    rest = [s for s in pieces if s != one]
    assume(any((s.group, s.tensor) == (one.group, one.tensor) for s in rest))
    with pytest.raises(ValueError) as caught:
        join([part(*rest)])
    assert str(caught.value).startswith(f"{one.group}: {one.tensor} ")


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([piece(1, 14)], "gap or an overlap"),
        ([piece(0, 8), piece(9, 6)], "gap or an overlap"),
        ([piece(0, 8), piece(7, 8)], "gap or an overlap"),
        ([piece(0, 8), piece(0, 15)], "gap or an overlap"),
        ([piece(0, 8), piece(8, 6)], "is not whole"),
        ([piece(0, 8), piece(8, 8)], "is not whole"),
    ],
)
def test_elements_are_held_once_each(pieces, told):
    whole = [piece(0, 15, group="discriminator"), piece(0, 15, tensor="bias")]
    with pytest.raises(ValueError, match=f"generator: weight .*{told}"):
        join([part(*whole), *(part(one) for one in pieces)])
