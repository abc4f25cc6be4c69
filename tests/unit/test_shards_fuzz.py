"""Damaged shards, indexes and images: only our own errors, in bounded time and memory.

Each space of inputs is that of valid files with some changes; the long form has 10,000 of each.
"""

import copy
import hashlib
import io
import json
import resource
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from cat_ray.data.decode import decode_image
from cat_ray.data.image_file import BrokenSample
from cat_ray.data.index import (
    EXTENTS_NAME,
    INDEX_NAME,
    Index,
    check_fits,
    check_shards,
    read_extents,
    read_index,
    write_index,
)
from cat_ray.data.read import Reading, part_of, read_parts
from cat_ray.data.shard_file import Entry, write_shard_file
from cat_ray.data.tar import members, read_samples, sample_extents, samples, scan
from cat_ray.errors import ExpectedError
from cat_ray.storage import Location, locate

CPU_SECONDS, MEMORY_BYTES = 2.0, 2**30
BLOCK, SIDE = 512, 8

Check = Callable[..., None]
checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
short = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=checks)
long = settings(max_examples=10_000, deadline=None, suppress_health_check=checks)


@contextmanager
def within_limits() -> Iterator[None]:
    """Processor time, which other processes don't change, and the process's peak of memory."""
    began, peak = time.process_time(), peak_bytes()
    yield
    assert time.process_time() - began < CPU_SECONDS
    assert peak_bytes() - peak < MEMORY_BYTES


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Tar headers.

FIELDS = {
    "name": slice(0, 100),
    "mode": slice(100, 108),
    "size": slice(124, 136),
    "checksum": slice(148, 156),
    "kind": slice(156, 157),
    "link": slice(157, 257),
    "mark": slice(257, 265),
    "prefix": slice(345, 500),
}
NUMBERS = [b"", b"0", b"7", b"1000", b"-1000", b"+7", b"1_0", b"0o7", b"8", b" 12 ", b"77777777777"]
NUMBERS += [b"\x80" + bytes(10) + b"\x05", b"\x80" + b"\xff" * 11, b"\xff" * 12]
NUMBERS += [b"\xff" * 10 + b"\xfe\0", b"\x81" + bytes(11), b"\0" * 12, b"\x001", b"1\0" * 6]
KINDS = [bytes([kind]) for kind in b"\x000123456789ADEGIKLMNSVXgx"]
NAMES = [b"", b"/", b".", b"0.png", b"0.cls", b"1.png", b"._0.png", b"a/", b"\xff\xfe.png", b"\n"]
NAMES += [b".DS_Store", b"__MACOSX/0.png", b"LICENSE", b"n" * 100]
RECORDS = [b"0 a=b\n", b"-5 a=b\n", b"x a=b\n", b"12 path=abc\n", b"14 size=-5120\n", b"9 size=\n"]
RECORDS += [b"10 size=5\n", b"11 size=1e\n", b"8 path=\n", b"999999999 a=b\n", b"6 a=b\n"]
RECORDS += [b"22 GNU.sparse.major=1\n", b"5 a=b\n", b" 5 a=b\n", b"5  =b\n", b"\0" * 9, b"9" * 5000]


def tar_of(kind: int, names: list[str]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=kind) as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 300 * number
            info.mtime = 0.5 if kind == tarfile.PAX_FORMAT else 0
            archive.addfile(info, io.BytesIO(bytes([number]) * info.size))
    return content.getvalue().rstrip(b"\0") + bytes(2 * BLOCK)


SHORT = ["0.png", "0.cls", "1.png", "1.cls"]
TARS = [
    tar_of(kind, names)
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    for names in (SHORT, ["._0.png", *SHORT, "LICENSE"], [f"{'n' * 90}/{'m' * 60}.png", *SHORT])
]
TARS = [content + bytes(-len(content) % BLOCK) for content in TARS]


def maybe_cut(draw: st.DrawFn, content: bytes) -> bytes:
    cut = draw(st.integers(0, 5)) == 0
    return content[: draw(st.integers(0, len(content)))] if cut else content


def with_checksum(block: bytes) -> bytes:
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


@st.composite
def damaged_tars(draw: st.DrawFn) -> bytes:
    blocks = draw(st.sampled_from(TARS))
    cut = [blocks[at : at + BLOCK] for at in range(0, len(blocks), BLOCK)]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(cut) - 1))
        change = draw(
            st.sampled_from(["field", "field", "field", "record", "bytes", "copy", "drop"])
        )
        if change == "field":
            headers = [n for n, block in enumerate(cut) if block[257:262] == b"ustar"] or [at]
            at = draw(st.sampled_from(headers))
            name = draw(st.sampled_from(sorted(FIELDS)))
            field = FIELDS[name]
            values = {"kind": KINDS, "name": NAMES, "prefix": NAMES}.get(name, NUMBERS)
            value = draw(st.sampled_from(values) | st.binary(max_size=field.stop - field.start))
            value = value[: field.stop - field.start].ljust(field.stop - field.start, b"\0")
            block = cut[at][: field.start] + value + cut[at][field.stop :]
            cut[at] = with_checksum(block) if name != "checksum" else block
        elif change == "record":
            header = next((n for n, b in enumerate(cut[:-1]) if b[156:157] in b"xgLX"), at)
            records = b"".join(draw(st.lists(st.sampled_from(RECORDS), min_size=1, max_size=3)))
            size = b"%011o\0" % len(records[:BLOCK])
            kind = draw(st.sampled_from([b"x", b"g", b"L", b"X"]))
            whole = cut[header][:124] + size + cut[header][136:156] + kind + cut[header][157:]
            cut[header] = with_checksum(whole)
            cut[header + 1 : header + 2] = [records[:BLOCK].ljust(BLOCK, b"\0")]
        elif change == "bytes":
            place = draw(st.integers(0, BLOCK - 1))
            value = draw(st.binary(min_size=1, max_size=8))
            cut[at] = (cut[at][:place] + value + cut[at][place + len(value) :])[:BLOCK]
        elif change == "copy":
            cut.insert(draw(st.integers(0, len(cut))), cut[at])
        elif len(cut) > 1:
            del cut[at]
    content = b"".join(cut)
    return (
        content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 5)) == 0 else content
    )


def of_tarfile(content: bytes) -> list[tuple[str, int, int, int]]:
    """What Python's module finds before it stops, which it does without an error."""
    found = []
    with (
        suppress(tarfile.TarError, ValueError, RecursionError),
        tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive,
    ):
        while (info := archive.next()) is not None:
            if info.isfile() and not info.name.endswith("/"):
                found.append((info.name, info.offset, info.offset_data, info.size))
    return found


def check_tar(folder: Path, content: bytes) -> None:
    place = locate(str(folder / f"{hashlib.sha256(content).hexdigest()}.tar"))
    place.write(content)
    for read in (
        lambda: samples(content, "shard"),
        lambda: samples(content, "shard", whole=False, all_members=True),
        lambda: read_samples(place, len(content), hashlib.sha256().update, alone=True),
        lambda: scan(place, 0, len(content)),
        lambda: sample_extents(place),
    ):
        with within_limits(), suppress(ExpectedError):
            list(read())
    place.delete()
    found = None
    with suppress(ExpectedError):
        found = [(m.name, m.header, m.start, m.size) for m in members(content, "shard")]
    if found is not None:
        assert all(0 <= start <= start + size <= len(content) for _, _, start, size in found)
        known = of_tarfile(content)
        for own, other in zip(found, known, strict=False):
            assert (own[0], own[2], own[3]) == (other[0], other[2], other[3])
            # Here an entry about all members counts to the next one; for a run it makes no odds.
            assert own[1] <= other[1]
        assert len(known) <= len(found)


# An entry about all members before the second.
GLOBAL = TARS[0][:BLOCK] + with_checksum(
    TARS[0][:124] + b"%011o\0" % 15 + TARS[0][136:156] + b"g" + TARS[0][157:BLOCK]
)
GLOBAL += b"15 comment=abc\n".ljust(BLOCK, b"\0") + TARS[0][BLOCK:]


@short
@example(content=GLOBAL)
@given(content=damaged_tars())
def test_a_damaged_tar_is_refused_or_read_as_pythons_own_module_reads_it(tmp_path, content):
    check_tar(tmp_path, content)


@pytest.mark.long
@long
@given(content=damaged_tars())
def test_ten_thousand_damaged_tars(tmp_path, content):
    check_tar(tmp_path, content)


# index.json and the extents, beside real shards.


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """Two shards of three grey images."""
    folder = locate(str(tmp_path_factory.mktemp("shards")))
    written = []
    for number in range(2):
        entries = [
            Entry(f"{number}-{n}", {"png": PNGS[0], "cls": str(n).encode()}, [n]) for n in range(3)
        ]
        written.append(write_shard_file(folder, f"{number}.tar", entries))
    index = Index("images", SIDE, 3, (2, 2, 2), "tests", tuple(w.shard for w in written), "")
    write_index(folder, index, {w.shard.name: w.extents for w in written})
    return folder


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 64, 2**31, 2**63, 10**30, 1.0, 0.5, float("nan"), float("inf")]),
    st.sampled_from(["", "500", "images", "latents", "../0.tar", "0.tar", "1.tar", "\0", "\ud800"]),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just([[[[[[]]]]]]),
)


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a structure: what holds it, and under which key."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from spots(value[key])


def check_index(folder: Location) -> None:
    """Reads as a run does that is begun on this folder."""
    with within_limits(), suppress(ExpectedError):
        index = read_index(folder)
        assert index.describe() and index.digest() and index.block_images() > 0
        check_shards(index, folder)
        read_as_indexed(folder, index)


def read_as_indexed(folder: Location, index: Index) -> None:
    extents = read_extents(folder, index)
    check_fits(index, SIDE, 3, 3)
    reading = Reading(folder, index.contents, SIDE, 3, crop=True, num_classes=3)
    for number, shard in enumerate(index.shards):
        for size in (1, 2, 64):
            block = size * index.pack_images
            for first in range(0, min(shard.count, 6), block):
                with suppress(ExpectedError):
                    read_parts(reading, [part_of(index, extents, block, number, [first])])


@st.composite
def damaged_indexes(draw: st.DrawFn) -> Any:
    """A change of an index's values."""
    return [
        (draw(st.integers(0, 10**6)), draw(st.sampled_from(["set", "set", "drop", "add"])), value)
        for value in draw(st.lists(VALUES, min_size=1, max_size=3))
    ]


def changed(values: Any, changes: Any) -> bytes:
    values = copy.deepcopy(values)
    for number, change, new in changes:
        found = list(spots(values))
        if not found:
            break
        # One value may be drawn for several places.
        (holder, key), value = found[number % len(found)], copy.deepcopy(new)
        if change == "set":
            holder[key] = value
        elif change == "drop":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(value)
        else:
            holder["more"] = value
    return json.dumps(values).encode()


def check_damaged_index(folder: Location, changes: Any, cut: int | None) -> None:
    whole = (folder / INDEX_NAME).read()
    content = changed(json.loads(whole), changes)
    try:
        (folder / INDEX_NAME).write(content if cut is None else content[: cut % len(content)])
        check_index(folder)
    finally:
        (folder / INDEX_NAME).write(whole)


cuts = st.none() | st.none() | st.none() | st.integers(0, 10**6)


@short
@given(changes=damaged_indexes(), cut=cuts)
def test_a_damaged_index_is_refused_or_read(shards, changes, cut):
    check_damaged_index(shards, changes, cut)


@pytest.mark.long
@long
@given(changes=damaged_indexes(), cut=cuts)
def test_ten_thousand_damaged_indexes(shards, changes, cut):
    check_damaged_index(shards, changes, cut)


@st.composite
def damaged_extents(draw: st.DrawFn) -> Any:
    """Changes of the places in a shard, or of the file's bytes."""
    place = st.one_of(
        st.integers(-(2**63), 2**63 - 1), st.integers(-2, 8).map(lambda n: n * BLOCK), st.just(0)
    )
    return {
        "shard": draw(st.integers(0, 1)),
        "places": draw(st.lists(st.tuples(st.integers(0, 3), place), max_size=3)),
        "form": draw(
            st.sampled_from(["", "", "", "", "int32", "float64", "2d", "short", "long", "missing"])
        ),
        "bytes": draw(
            st.none() | st.none() | st.tuples(st.integers(0, 300), st.binary(max_size=6))
        ),
    }


def check_damaged_extents(folder: Location, damage: Any) -> None:
    whole, index = (folder / EXTENTS_NAME).read(), read_index(folder)
    extents = {name: places.copy() for name, places in read_extents(folder, index).items()}
    name = index.shards[damage["shard"]].name
    for at, value in damage["places"]:
        extents[name][at] = value
    places = extents[name]
    forms: dict[str, Callable[[], np.ndarray]] = {
        "int32": lambda: places.astype(np.int32),
        "float64": lambda: places.astype(np.float64),
        "2d": lambda: places[None],
        "short": lambda: places[:-1],
        "long": lambda: np.append(places, places[-1] + BLOCK),
    }
    if damage["form"] == "missing":
        del extents[name]
    elif damage["form"]:
        extents[name] = forms[damage["form"]]()
    content = save(extents)
    if damage["bytes"] is not None:
        at, value = damage["bytes"]
        content = content[:at] + value + content[at + len(value) :]
    # As an attacker would have it: the index tells of just this file.
    index = replace(index, extents_sha256=hashlib.sha256(content).hexdigest())
    try:
        (folder / EXTENTS_NAME).write(content)
        with within_limits(), suppress(ExpectedError):
            read_as_indexed(folder, index)
    finally:
        (folder / EXTENTS_NAME).write(whole)


@short
@given(damage=damaged_extents())
def test_damaged_extents_are_refused_or_read(shards, damage):
    check_damaged_extents(shards, damage)


@pytest.mark.long
@long
@given(damage=damaged_extents())
def test_ten_thousand_damaged_extents(shards, damage):
    check_damaged_extents(shards, damage)


# Image bytes.


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
DEEP = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
PNGS = [
    encoded(NOISE, "PNG"),
    encoded(NOISE.convert("RGBA"), "PNG"),
    encoded(NOISE.convert("LA"), "PNG"),
    encoded(NOISE.quantize(16), "PNG", transparency=0),
    encoded(DEEP, "PNG"),
    encoded(NOISE, "PNG", save_all=True, append_images=[NOISE.rotate(90)]),
]
JPEGS = [
    encoded(NOISE, "JPEG"),
    encoded(NOISE, "JPEG", progressive=True, icc_profile=b"profile" * 9),
    encoded(NOISE.convert("L"), "JPEG", comment=b"cat"),
    encoded(NOISE.convert("CMYK"), "JPEG"),
    encoded(NOISE, "MPO", save_all=True, append_images=[NOISE]),
]
OTHERS = [
    encoded(NOISE, "WEBP"),
    encoded(NOISE.convert("RGBA"), "WEBP", lossless=True),
    encoded(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(90)]),
    encoded(NOISE, "GIF"),
    encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(90)]),
]
# As a frame header of a JPEG, PNG's first chunk and the canvas of WEBP and GIF tell a size.
SIZES = st.sampled_from([0, 1, 8, 9, 200, 9_000, 16_383, 65_500, 65_535, 2**24, 2**31 - 1])


def resized(content: bytes, width: int, height: int) -> bytes:
    """The same file with another size in its header."""
    short_width, short_height = width % 2**16, height % 2**16
    if content[:3] == b"\xff\xd8\xff":
        for mark in (b"\xff\xc0", b"\xff\xc2"):
            at = content.find(mark)
            if at > 0:
                size = short_height.to_bytes(2) + short_width.to_bytes(2)
                content = content[: at + 5] + size + content[at + 9 :]
        return content
    if content[:4] == b"\x89PNG":
        head = b"IHDR" + (width % 2**32).to_bytes(4) + (height % 2**32).to_bytes(4)
        head += content[24:29]
        return content[:12] + head + zlib.crc32(head).to_bytes(4) + content[33:]
    if content[:3] == b"GIF":
        size = short_width.to_bytes(2, "little") + short_height.to_bytes(2, "little")
        return content[:6] + size + content[10:]
    at = 24 if content[12:16] == b"VP8X" else 26
    size = (width % 2**24).to_bytes(3, "little") + (height % 2**24).to_bytes(3, "little")
    size = size if at == 24 else size[0:2] + size[3:5]
    return content[:at] + size + content[at + len(size) :]


@st.composite
def damaged_images(draw: st.DrawFn) -> bytes:
    content = draw(st.sampled_from(PNGS + JPEGS + OTHERS))
    if draw(st.integers(0, 2)) == 0:
        content = resized(content, draw(SIZES), draw(SIZES))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        old, new = draw(st.sampled_from([0, 1, 2, 4])), draw(st.binary(max_size=4))
        content = content[:at] + new + content[at + old :]
    return (
        content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 5)) == 0 else content
    )


def check_image(content: bytes) -> None:
    for channels, crop in ((3, True), (1, True), (3, False)):
        out = np.empty((SIDE, SIDE, channels), np.uint8)
        with within_limits(), suppress(BrokenSample):
            decode_image(content, channels, SIDE, crop, out)


@short
@given(content=damaged_images())
def test_a_damaged_image_is_decoded_or_a_broken_sample(content):
    check_image(content)


@pytest.mark.long
@long
@given(content=damaged_images())
def test_ten_thousand_damaged_images(content):
    check_image(content)
