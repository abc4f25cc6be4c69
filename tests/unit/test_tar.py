"""Tar files as shards: the members that Python's own module finds, and samples cut out of them."""

import gzip
import io
import os
import tarfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs

from cat_ray.data.tar import (
    Member,
    RawSample,
    members,
    padded,
    read_samples,
    sample_extents,
    samples,
    scan,
    split_name,
)
from cat_ray.errors import BadInput, Damaged
from cat_ray.storage import Location, locate

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BLOCK = 512
some = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

Members = Sequence[tuple[str, bytes]]

# As long as 100 bytes fit a plain header; longer ones are split, or have a header of their own.
folders = st.sampled_from(["", "a/", "n01440764/", "f" * 60 + "/", "./"])
stems = st.sampled_from(["0", "1", "00000017", "ü", "猫", "s" * 90, "s" * 97, "a b"])
endings = st.sampled_from([".png", ".cls", ".JPG", ".seg.png", "", "."])
names = st.tuples(folders, stems, endings).map("".join)
contents = st.one_of(st.binary(max_size=40), st.integers(0, 1600).map(lambda n: b"\xab" * n))
files = st.lists(st.tuples(names, contents), max_size=8)


def tar(of: Members, kind: str = "ustar", mtime: float = 0) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=FORMATS[kind]) as archive:
        for name, data in of:
            info = tarfile.TarInfo(name)
            # A time with a fraction gets a header of its own in the pax format.
            info.size, info.mtime = len(data), mtime
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def of_tarfile(content: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return [Member(i.name, i.offset, i.offset_data, i.size) for i in archive if i.isfile()]


def whole(content: bytes, name: str = "shard") -> list[Member]:
    return list(members(content, name))


def remote(folder: Path, name: str) -> Location:
    """A file on a filesystem that isn't this machine's, as an object store is."""
    store = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
    return Location(store, name, f"s3://bucket/{name}")


# Members.


@some
@given(files, st.sampled_from(sorted(FORMATS)), st.sampled_from([0, 1.5]))
def test_members_are_those_that_pythons_own_module_finds(of, kind, mtime):
    if kind == "ustar":
        of = [(name, data) for name, data in of if len(name.encode()) <= 100]
    content = tar(of, kind, mtime)
    found = whole(content)
    assert found == of_tarfile(content)
    assert [content[m.start : m.start + m.size] for m in found] == [data for _, data in of]


def test_a_name_that_ustar_splits_in_two_is_put_together():
    name = "d" * 80 + "/" + "e" * 50 + ".png"
    (member,) = whole(tar([(name, b"x")], "ustar"))
    assert member == Member(name, 0, BLOCK, 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_no_file_is_no_member_and_what_follows_it_is_found(kind):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=FORMATS[kind]) as archive:
        for name, entry in [("0.png", tarfile.DIRTYPE), ("1.png", tarfile.SYMTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = entry, "2.png" if entry == tarfile.SYMTYPE else ""
            archive.addfile(info)
        info = tarfile.TarInfo("2.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    found = whole(content.getvalue())
    assert found == of_tarfile(content.getvalue())
    assert [member.name for member in found] == ["2.png"]
    assert [sample.key for sample in samples(content.getvalue(), "shard")] == ["2"]


def test_an_archive_that_the_tar_program_wrote_is_read(tmp_path):
    for name in ("a/0.png", "a/" + "n" * 120 + ".png", "b/1.cls"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(700))
    for kind in ("v7", "ustar", "gnu", "pax"):
        names = ("a", "b") if kind in ("gnu", "pax") else ("b",)
        target = tmp_path / f"{kind}.tar"
        code = os.spawnlp(
            os.P_WAIT, "tar", "tar", f"--format={kind}", "-C", tmp_path, "-cf", target, *names
        )
        assert code == 0
        found = whole(target.read_bytes())
        assert found == of_tarfile(target.read_bytes())
        assert len(found) == (3 if "a" in names else 1)


def test_an_empty_tar_has_no_members():
    assert whole(tar([])) == []
    assert list(samples(tar([]), "shard")) == []


# Damage.

WHOLE = tar([("0.png", b"p" * 600), ("0.cls", b"1"), ("1.png", b"p" * 600), ("1.cls", b"2")])
LONG = tar([(f"{'n' * 120}/{n}.png", b"p" * 600) for n in range(2)], "gnu")
DAMAGED = [
    b"",
    b"no tar at all",
    b"\0" * 100,
    b"\x89PNG\r\n\x1a\n" * 100,
    gzip.compress(WHOLE),
    WHOLE[:300],
    WHOLE[:512],
    WHOLE[:900],
    WHOLE[:1100],
    WHOLE[:2048],
    WHOLE[:3100],
    WHOLE[:2560],
    WHOLE[:2800],
    WHOLE[:2560] + b"garbage!" * 64 + WHOLE[3072:],
    # A size, a checksum and a name in which one digit is another.
    WHOLE[:130] + b"7" + WHOLE[131:],
    WHOLE[:150] + b"x" + WHOLE[151:],
    WHOLE[:1] + b"!" + WHOLE[2:],
    LONG[:300],
    LONG[:1400],
    LONG[:1800],
    LONG[:2700],
    LONG[: len(LONG) // BLOCK * BLOCK // 2],
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_shard_that_is_no_whole_tar_is_refused_by_name(content, tmp_path):
    for read in (members, samples):
        with pytest.raises(BadInput, match=r"shard seven\.tar is not a whole tar file"):
            list(read(content, "seven.tar"))
    (tmp_path / "seven.tar").write_bytes(content)
    # An empty file is no tar either, but has no header that could be looked at.
    if content:
        for place in (locate(f"{tmp_path}/seven.tar"), remote(tmp_path, "seven.tar")):
            with pytest.raises(BadInput, match=r"shard seven\.tar is not a whole tar file"):
                list(scan(place, 0, len(content)))


@some
@given(st.sampled_from([WHOLE, LONG]), st.data())
def test_a_tar_that_is_cut_anywhere_within_its_members_is_refused(content, data):
    last = of_tarfile(content)[-1]
    cut = data.draw(st.integers(0, last.start + padded(last.size)))
    with pytest.raises(BadInput, match="not a whole tar file"):
        whole(content[:cut])


@some
@given(st.sampled_from(["ustar", "gnu", "pax"]), st.data())
def test_a_run_of_members_that_is_cut_is_refused_or_holds_fewer_of_them(kind, data):
    names = [f"{'n' * 120 if kind != 'ustar' else 'n'}/{n}.png" for n in range(2)]
    content = tar([(name, bytes(range(250)) * 3) for name in names], kind)
    found = of_tarfile(content)
    cut = data.draw(st.integers(1, found[-1].start + padded(found[-1].size) - 1))
    try:
        run = list(samples(content[:cut], "shard", whole=False))
    except BadInput as error:
        assert "shard shard is not a whole tar file" in str(error)
    else:
        assert cut == found[1].header
        assert [sample.members for sample in run] == [{"png": bytes(range(250)) * 3}]


def test_a_byte_that_flips_in_any_header_is_noticed():
    for header in (member.header for member in of_tarfile(WHOLE)):
        for at in (*range(100, 108), *range(124, 136), 156, 257, 300):
            damaged = bytearray(WHOLE)
            damaged[header + at] ^= 1
            with pytest.raises(BadInput, match="not a whole tar file"):
                whole(bytes(damaged))


# Samples.


@some
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["png", "cls", "seg.png", "json"]), st.binary(max_size=700), min_size=1
        ),
        max_size=6,
    )
)
def test_members_that_share_a_name_are_a_sample(of):
    content = tar([(f"a/{n:03d}.{e}", data) for n, s in enumerate(of) for e, data in s.items()])
    found = list(samples(content, "shard"))
    assert [(s.key, s.members) for s in found] == [(f"a/{n:03d}", s) for n, s in enumerate(of)]


def test_a_sample_is_told_by_its_folder_too_and_endings_are_lower_case():
    content = tar([("a/0.PNG", b"1"), ("b/0.png", b"2"), ("0.Cls", b"3")])
    assert list(samples(content, "shard")) == [
        RawSample("a/0", {"png": b"1"}, 0, 1024),
        RawSample("b/0", {"png": b"2"}, 1024, 2048),
        RawSample("0", {"cls": b"3"}, 2048, 3072),
    ]


@pytest.mark.parametrize(
    ("name", "key", "ending"),
    [
        ("0.png", "0", "png"),
        ("a.b/0.png", "a.b/0", "png"),
        ("a/0.seg.PNG", "a/0", "seg.png"),
        ("./0.cls", "./0", "cls"),
        ("/a/0.cls", "a/0", "cls"),
        ("README", "README", ""),
        (".hidden", "", "hidden"),
    ],
)
def test_a_name_is_a_key_up_to_the_first_dot_and_an_ending(name, key, ending):
    assert split_name(name) == (key, ending)


# Parts of a shard.


def places(folder: Path, content: bytes) -> tuple[Location, Location]:
    """The same bytes on this machine and in a store."""
    (folder / "shard").write_bytes(content)
    return locate(f"{folder}/shard"), remote(folder, "shard")


@some
@given(files, st.sampled_from(["gnu", "pax"]), st.sampled_from([0, 1.5]))
def test_a_scan_of_a_file_finds_what_lies_in_memory(tmp_path, of, kind, mtime):
    content = tar(of, kind, mtime)
    # Each example has a file of its own: a file that is open must not change.
    folder = tmp_path / os.urandom(8).hex()
    folder.mkdir()
    for place in places(folder, content):
        assert list(scan(place, 0, len(content))) == whole(content)


@pytest.mark.parametrize("window_bytes", [BLOCK, 1300, 4096, 2**23])
def test_a_scan_of_a_tar_within_a_file_counts_from_the_files_beginning(
    tmp_path, monkeypatch, window_bytes
):
    inner = tar([(f"{n}.png", b"p" * 400 * n) for n in range(9)])
    long = tar([("n" * 150, b"q" * 700)], "gnu")
    content = b"x" * 77 + inner + b"y" * 600 + long + b"z" * 99
    monkeypatch.setattr("cat_ray.data.tar.SCAN_BYTES", window_bytes)
    for begin, of in ((77, inner), (677 + len(inner), long)):
        for place in places(tmp_path, content):
            found = list(scan(place, begin, begin + len(of)))
            assert [(m.name, m.start - begin, m.size) for m in found] == [
                (m.name, m.start, m.size) for m in whole(of)
            ]
            assert [m.header - begin for m in found] == [m.header for m in whole(of)]


@some
@given(
    files,
    st.sampled_from(["gnu", "pax"]),
    st.sampled_from([512, 700, 1024, 5000, 2**23]),
    st.binary(max_size=1500),
)
def test_a_shard_read_piece_by_piece_has_the_samples_and_bytes_that_lie_in_memory(
    tmp_path, of, kind, window_bytes, behind
):
    content = tar(of, kind, 0) + behind
    folder = tmp_path / os.urandom(8).hex()
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cat_ray.data.tar.SCAN_BYTES", window_bytes)
        for place in places(folder, content):
            seen: list[bytes] = []
            assert list(read_samples(place, len(content), seen=seen.append)) == list(
                samples(content, "shard")
            )
            assert b"".join(seen) == content
            # Each piece was let go of before the next.
            longest = max((len(held) for _, held in of), default=0)
            assert max(map(len, seen)) <= window_bytes + longest + 4 * BLOCK


@some
@given(files, st.sampled_from(["gnu", "pax"]), st.sampled_from([0, 1.5]), st.data())
def test_samples_cut_out_by_their_extents_are_those_of_the_whole_shard(
    tmp_path, of, kind, mtime, data
):
    content = tar(of, kind, mtime)
    folder = tmp_path / os.urandom(8).hex()
    folder.mkdir()
    local, store = places(folder, content)
    extents = sample_extents(local)
    assert sample_extents(store) == extents
    found = list(samples(content, "shard"))
    assert extents == [*(s.begin for s in found), found[-1].end if found else 0]
    assert all(before.end == after.begin for before, after in pairwise(found))
    if found:
        first = data.draw(st.integers(0, len(found) - 1))
        beyond = data.draw(st.integers(first + 1, len(found)))
        run = content[extents[first] : extents[beyond]]
        cut = [(s.key, s.members) for s in samples(run, "shard", whole=False)]
        assert cut == [(s.key, s.members) for s in found[first:beyond]]


# Headers that no writer makes.


def header_of(content: bytes, **fields: bytes) -> bytes:
    """A tar whose first header has other bytes in some fields, and the right checksum."""
    places = {"size": 124, "kind": 156, "name": 0}
    block = bytearray(content[:BLOCK])
    for name, value in fields.items():
        block[places[name] : places[name] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content[BLOCK:]


def with_records(records: bytes, kind: bytes = b"x") -> bytes:
    """A tar whose first entry is a PAX header of such content."""
    entry = header_of(tar([("pax", records)]), kind=kind)
    return entry[: BLOCK + padded(len(records))] + WHOLE


HOSTILE = {
    "a size of -512": header_of(WHOLE, size=b"-0000001000\0"),
    "a size of -512 in binary": header_of(WHOLE, size=b"\xff" * 10 + b"\xfe\0"),
    "a size of 2 ** 88": header_of(WHOLE, size=b"\x80" + b"\xff" * 11),
    "a size with an underline": header_of(WHOLE, size=b"00000001_00\0"),
    "a PAX record of length 0": with_records(b"0 path=a\n"),
    "a PAX record of negative length": with_records(b"-9 path=a\n"),
    "a PAX record whose length is text": with_records(b"xx path=a\n"),
    "a PAX record that ends elsewhere": with_records(b"99 path=a\n"),
    "a PAX size that is text": with_records(b"12 size=abc\n"),
    "a PAX size below 0": with_records(b"13 size=-512\n"),
    "a PAX size of 5,000 digits": with_records(b"5010 size=" + b"9" * 4999 + b"\n"),
    "one name for all members": with_records(b"10 path=a\n", kind=b"g"),
    "an empty name": with_records(b"\0" * 9, kind=b"L"),
    "a long name of 2 MiB": with_records(b"n" * 2**21, kind=b"L"),
    "a long name beyond its size": header_of(
        with_records(b"n" * 155 + b"\0", kind=b"L"), size=b"00000000012\0"
    ),
    "a sparse member": header_of(WHOLE, kind=b"S"),
    "a sparse member as PAX has it": with_records(b"22 GNU.sparse.major=1\n"),
    "a PAX header before the end": tar([])[:0] + with_records(b"10 path=a\n")[:1024] + bytes(1024),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_no_writer_makes_is_damage_that_is_told_in_one_line(case, tmp_path):
    content = HOSTILE[case]
    (tmp_path / "seven.tar").write_bytes(content)
    place = locate(f"{tmp_path}/seven.tar")
    for read in (
        lambda: members(content, "seven.tar"),
        lambda: scan(place, 0, len(content)),
        lambda: read_samples(place, len(content), seen=lambda piece: None),
    ):
        with pytest.raises(Damaged, match=r"shard seven\.tar is not a whole tar file") as caught:
            list(read())
        assert "\n" not in str(caught.value)


def test_a_truncated_member_is_named_with_its_bytes():
    with pytest.raises(Damaged, match=r'"1\.png" is truncated at byte 3,200 \(declared 4,096\)'):
        whole(WHOLE[:3200])


def test_a_sparse_file_that_gnu_tar_wrote_is_refused_not_garbled(tmp_path):
    with (tmp_path / "0.png").open("wb") as file:
        file.truncate(2**20)
        file.seek(2**19)
        file.write(b"x")
    for kind in ("gnu", "pax"):
        target = tmp_path / f"{kind}.tar"
        arguments = ("tar", "--sparse", f"--format={kind}", "-C", tmp_path, "-cf", target, "0.png")
        assert os.spawnlp(os.P_WAIT, "tar", *arguments) == 0
        with pytest.raises(Damaged, match="without --sparse"):
            whole(target.read_bytes())


def test_a_second_tar_behind_the_first_is_not_lost_without_a_word(tmp_path):
    content = WHOLE + LONG
    (tmp_path / "0.tar").write_bytes(content)
    place = locate(f"{tmp_path}/0.tar")
    with pytest.raises(Damaged, match=rf"another one begins .* at byte {len(WHOLE):,}: join"):
        list(read_samples(place, len(content), alone=True))
    with pytest.raises(Damaged, match="another one begins behind its end"):
        list(scan(place, 0, len(content)))


# Members that belong to no sample.

DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "
PLAIN_FILES = [(f"{n:04d}.{e}", bytes([n]) * 700) for n in range(3) for e in ("cls", "jpg")]
AROUND = {
    "macOS": [pair for f in PLAIN_FILES for pair in ((f"._{f[0]}", DOUBLE), f)],
    "macOS with ./": [
        pair for name, c in PLAIN_FILES for pair in ((f"./._{name}", DOUBLE), (f"./{name}", c))
    ],
    "other files": [
        ("LICENSE", b"text"),
        ("__meta__.json", b"{}"),
        *PLAIN_FILES,
        (".DS_Store", b"x"),
        ("__MACOSX/._0000.jpg", DOUBLE),
        ("a/__MACOSX/0000.jpg", DOUBLE),
    ],
}


@pytest.mark.parametrize("case", AROUND)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_belongs_to_no_sample_is_left_out_of_samples_and_extents(tmp_path, case, kind):
    content = tar(AROUND[case], kind)
    left_out: list[str] = []
    plain = [(s.key, s.members) for s in samples(tar(PLAIN_FILES), "shard")]
    for place in places(tmp_path, content):
        left_out.clear()
        found = list(read_samples(place, len(content), left_out=left_out.append))
        assert [(s.key.removeprefix("./"), s.members) for s in found] == plain
        assert len(left_out) == len(AROUND[case]) - len(PLAIN_FILES)
        extents = sample_extents(place)
        assert len(extents) == 4
        for at, sample in enumerate(found):
            run = content[extents[at] : extents[at + 1]]
            (cut,) = samples(run, "shard", whole=False)
            assert (cut.key, cut.members) == (sample.key, sample.members)


def test_a_hash_covers_what_is_left_out_however_large(tmp_path, monkeypatch):
    monkeypatch.setattr("cat_ray.data.tar.SCAN_BYTES", 1024)
    content = tar(
        [("0.png", b"a"), ("LICENSE", os.urandom(9000)), ("1.png", b"b"), ("README", b"c")]
    )
    for place in places(tmp_path, content):
        seen: list[bytes] = []
        assert len(list(read_samples(place, len(content), seen=seen.append))) == 2
        assert b"".join(seen) == content


# Names that come twice.


def test_members_that_come_twice_side_by_side_are_told():
    twice = [("0.jpg", b"a"), ("0.cls", b"0"), ("0.jpg", b"b"), ("0.cls", b"1"), ("1.jpg", b"")]
    first, second = samples(tar(twice), "shard")
    assert (first.repeated, second.repeated) == (("0.jpg", "0.cls"), ())
