"""The tar files that shards are: members, and the samples that they make up."""

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from cat_ray.errors import BadInput
from cat_ray.storage import Location

BLOCK_BYTES = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK_BYTES)
SCAN_BYTES = 2**23
# As POSIX lays a header out: bytes of the size and place of the type; the rest is looked at by the
# tarfile module only where a type is not that of a plain file.
NAME, SIZE, KIND, MAGIC = slice(0, 100), slice(124, 136), 156, slice(257, 262)
CHECKSUM, PREFIX = slice(148, 156), slice(345, 500)
PLAIN = (tarfile.REGTYPE[0], tarfile.AREGTYPE[0])


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name and where it lies, in bytes, header and content."""

    name: str
    header: int
    start: int
    size: int


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in the shard: member contents by ending, and the bytes that hold it."""

    key: str
    members: dict[str, bytes]
    begin: int = 0
    end: int = 0


def members(content: bytes, name: str, whole: bool = True) -> Iterator[Member]:
    """The files in a tar, or in a run of whole members cut out of one.

    The tarfile module would do, at 20 times the time: more than decoding a small image takes.

    Args:
        content: the bytes.
        name: of the shard, for messages.
        whole: they are a whole tar file, with the zeros at its end.

    Raises:
        BadInput: it is not a tar file, or ends in the middle of one.
    """

    def header_at(at: int) -> bytes:
        return content[at : at + BLOCK_BYTES]

    def from_there(at: int) -> BinaryIO:
        # A run of members has no zeros at its end.
        return io.BytesIO(content[at:] + (b"" if whole else 2 * ZEROS))

    yield from _walk(header_at, from_there, len(content), name, whole)


def scan(place: Location, begin: int, end: int) -> Iterator[Member]:
    """The files in a whole tar that lies between two bytes of a file, header by header.

    Where members lie is counted from the beginning of the file. Of a store's file much is read at
    once: asking for each header by itself takes longer.

    Raises:
        BadInput: it is not a tar file, or ends in the middle of one, or the storage fails.
    """
    window_bytes = BLOCK_BYTES if place.local_path else SCAN_BYTES
    window, window_at = b"", 0

    def header_at(at: int) -> bytes:
        nonlocal window, window_at
        if not window_at <= at <= at + BLOCK_BYTES <= window_at + len(window):
            window_at = at
            window = place.read_range(begin + at, min(begin + at + window_bytes, end))
        return window[at - window_at :][:BLOCK_BYTES]

    def from_there(at: int) -> BinaryIO:
        return io.BytesIO(place.read_range(begin + at, end))

    for member in _walk(header_at, from_there, end - begin, place.name, whole=True):
        yield Member(member.name, begin + member.header, begin + member.start, member.size)


def _walk(
    header_at: Callable[[int], bytes],
    from_there: Callable[[int], BinaryIO],
    length: int,
    name: str,
    whole: bool,
) -> Iterator[Member]:
    at = 0
    while at < length:
        header = header_at(at)
        if header == ZEROS and whole:
            return
        if len(header) < BLOCK_BYTES or header[KIND] not in PLAIN or header[MAGIC] != b"ustar":
            for member in _members_of_any_kind(from_there(at), at, name):
                # Of a run, the zeros that were added to it could make up for what is missing.
                if member.start + padded(member.size) > length:
                    raise _broken(name, "it breaks off")
                yield member
            return
        try:
            size = int(header[SIZE].strip(b" \0"), 8)
            stated = int(header[CHECKSUM].strip(b" \0"), 8)
        except ValueError as error:
            raise _broken(name, "a header in it is damaged") from error
        # In the sum the checksum's own bytes are blanks.
        if sum(header) - sum(header[CHECKSUM]) + 8 * ord(" ") != stated:
            raise _broken(name, "a header in it is damaged")
        start = at + BLOCK_BYTES
        end = start + padded(size)
        if end > length:
            raise _broken(name, "it breaks off")
        base = header[NAME].rstrip(b"\0").decode(errors="surrogateescape")
        prefix = header[PREFIX].rstrip(b"\0").decode(errors="surrogateescape")
        yield Member(f"{prefix}/{base}" if prefix else base, at, start, size)
        at = end
    if whole:
        raise _broken(name, "it breaks off")


def _members_of_any_kind(file: BinaryIO, at: int, name: str) -> Iterator[Member]:
    """The files from a header on that isn't a plain file's: folders, links, long names."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.isfile():
                    yield Member(info.name, at + info.offset, at + info.offset_data, info.size)
            # The tarfile module takes a damaged header, or a missing one, for the end.
            file.seek(archive.offset)
            if file.read(BLOCK_BYTES) != ZEROS:
                raise tarfile.ReadError("it breaks off, or a header in it is damaged")
    except tarfile.TarError as error:
        raise _broken(name, str(error)) from error


def padded(size: int) -> int:
    """The bytes that a content takes up in a tar."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def split_name(name: str) -> tuple[str, str]:
    """A member's name as the key of its sample, up to a dot, and its ending."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}".lstrip("/"), ending.lower()


def samples(content: bytes, name: str, whole: bool = True) -> Iterator[RawSample]:
    """The samples of a WebDataset shard: neighbouring members that share the name up to a dot.

    The arguments and errors are those of `members`.
    """
    key, held, begin, end = None, {}, 0, 0
    for member in members(content, name, whole):
        own_key, ending = split_name(member.name)
        if own_key != key:
            if key is not None:
                yield RawSample(key, held, begin, member.header)
            key, held, begin = own_key, {}, member.header
        held[ending] = content[member.start : member.start + member.size]
        end = member.start + padded(member.size)
    if key is not None:
        yield RawSample(key, held, begin, end)


def sample_extents(place: Location) -> list[int]:
    """Where each sample of a shard begins, and where the last ends, in bytes: `[samples + 1]`.

    Raises:
        BadInput: it is not a whole tar file, or the storage fails.
    """
    extents, key, end = [], None, 0
    for member in scan(place, 0, place.size() or 0):
        own_key, _ = split_name(member.name)
        if own_key != key:
            extents.append(member.header)
            key = own_key
        end = member.start + padded(member.size)
    return [*extents, end]


def _broken(name: str, why: str) -> BadInput:
    return BadInput(f"shard {name} is not a whole tar file: {why}")
