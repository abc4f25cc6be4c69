"""The tar files that shards are: members, and the samples that they make up."""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from cat_ray.errors import BadInput
from cat_ray.storage import Location

BLOCK_BYTES = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK_BYTES)
SCAN_BYTES = 2**23
# As POSIX lays a header out, in bytes.
NAME, SIZE, KIND = slice(0, 100), slice(124, 136), 156
CHECKSUM, PREFIX = slice(148, 156), slice(345, 500)
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
# Links, devices, folders and pipes: what stands in their size is no content here.
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
ABOUT_THE_NEXT = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


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

    The tarfile module would do, at several times the time: a tenth of what a small image takes.

    Args:
        content: the bytes.
        name: of the shard, for messages.
        whole: they are a whole tar file, with the zeros at its end.

    Raises:
        BadInput: it is not a tar file, or ends in the middle of one.
    """

    yield from _walk(lambda begin, end: content[begin:end], len(content), name, whole)


def scan(place: Location, begin: int, end: int) -> Iterator[Member]:
    """The files in a whole tar that lies between two bytes of a file, header by header.

    Where members lie is counted from the beginning of the file. Of a store's file much is read at
    once: asking for each header by itself takes longer.

    Raises:
        BadInput: it is not a tar file, or ends in the middle of one, or the storage fails.
    """
    window = _Window(place, begin, end, BLOCK_BYTES if place.local_path else SCAN_BYTES)
    for member in _walk(window.read, end - begin, place.name, whole=True):
        yield Member(member.name, begin + member.header, begin + member.start, member.size)


class _Window:
    """Some of a file's bytes from one place to another; they are read on as they are asked for.

    `seen` gets every byte once, in order, if what is asked for goes forward without leaving out
    more than a window.
    """

    def __init__(
        self,
        place: Location,
        begin: int,
        end: int,
        window_bytes: int,
        seen: Callable[[bytes], None] = lambda content: None,
    ):
        self._place, self._begin, self._end = place, begin, end
        self._window_bytes, self._seen = window_bytes, seen
        self._at, self._held = 0, b""

    def read(self, first: int, last: int) -> bytes:
        """From one place to another, counted from where the window's part of the file begins."""
        known = self._at + len(self._held)
        if not self._at <= first <= last <= known:
            beyond = min(max(last, first + self._window_bytes), self._end - self._begin)
            goes_on = self._at <= first <= known + self._window_bytes
            kept = self._held[first - self._at :] if goes_on else b""
            begin = known if goes_on else first
            self._at = begin - len(kept)
            content = self._place.read_range(self._begin + begin, self._begin + beyond)
            self._seen(content)
            self._held = kept + content
        return self._held[first - self._at : last - self._at]


def _walk(
    read: Callable[[int, int], bytes], length: int, name: str, whole: bool
) -> Iterator[Member]:
    """The files of a tar of so many bytes, which `read` gives from one place to another."""
    at, told = 0, _Told()
    while at < length:
        header = read(at, min(at + BLOCK_BYTES, length))
        if header == ZEROS and whole:
            return
        size = _checked_size(header, name)
        kind, start = header[KIND : KIND + 1], at + BLOCK_BYTES
        if told.size is not None and kind not in ABOUT_THE_NEXT:
            size = told.size
        end = start + (0 if kind in WITHOUT_CONTENT else padded(size))
        if end > length:
            raise _broken(name, "it breaks off")
        if kind in ABOUT_THE_NEXT:
            told = told.and_also(kind, read(start, start + size), at)
        else:
            own_name = told.name or _name(header)
            # Before POSIX a folder was told by its name.
            if kind in PLAIN and not own_name.endswith("/"):
                yield Member(own_name, at if told.at is None else told.at, start, size)
            told = _Told()
        at = end
    if whole or told.at is not None:
        raise _broken(name, "it breaks off")


@dataclass(frozen=True)
class _Told:
    """What entries before a member say of it: its name and size, where they don't fit its header.

    `at` is where the first of them lies.
    """

    name: str | None = None
    size: int | None = None
    at: int | None = None

    def and_also(self, kind: bytes, content: bytes, at: int) -> "_Told":
        """With what one more entry says."""
        first = at if self.at is None else self.at
        if kind == tarfile.GNUTYPE_LONGNAME:
            return replace(self, name=_text(content), at=first)
        if kind != tarfile.XHDTYPE:
            return replace(self, at=first)
        # Records as "length key=value" and a line's end, the length being that of all of it.
        told, place = replace(self, at=first), 0
        while place < len(content) and content[place : place + 1].isdigit():
            record = content[place : place + int(content[place:].split(b" ", 1)[0])]
            key, _, value = record.split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
            if key == b"path":
                told = replace(told, name=value.decode(errors="surrogateescape"))
            elif key == b"size":
                told = replace(told, size=int(value))
            place += len(record)
        return told


def _checked_size(header: bytes, name: str) -> int:
    """The size that a header tells, if the header is whole."""
    try:
        stated = int(header[CHECKSUM].strip(b" \0"), 8)
        binary = header[SIZE.start] & 0x80
        size = (
            int.from_bytes(header[SIZE.start + 1 : SIZE.stop])
            if binary
            else int(header[SIZE].strip(b" \0") or b"0", 8)
        )
    except (ValueError, IndexError) as error:
        raise _broken(name, "it breaks off, or a header in it is damaged") from error
    # In the sum the checksum's own bytes are blanks.
    if sum(header) - sum(header[CHECKSUM]) + 8 * ord(" ") != stated:
        raise _broken(name, "a header in it is damaged")
    return size


def _name(header: bytes) -> str:
    base, prefix = _text(header[NAME]), _text(header[PREFIX])
    return f"{prefix}/{base}" if prefix else base


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="surrogateescape")


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
    found = members(content, name, whole)
    yield from _samples_of(found, lambda begin, end: content[begin:end])


def read_samples(
    place: Location,
    size: int,
    seen: Callable[[bytes], None] = lambda content: None,
) -> Iterator[RawSample]:
    """The samples of a whole shard, of which no more than some megabytes are held at a time.

    Args:
        place: of the shard.
        size: of the file, in bytes.
        seen: gets all of the file's bytes in order, for a hash.

    Raises:
        BadInput: it is not a whole tar file, or the storage fails.
    """
    window = _Window(place, 0, size, SCAN_BYTES, seen)
    end = 0
    for sample in _samples_of(_walk(window.read, size, place.name, whole=True), window.read):
        yield sample
        end = sample.end
    # The zeros at the end, and what may lie behind them.
    for begin in range(end, size, SCAN_BYTES):
        window.read(begin, min(begin + SCAN_BYTES, size))


def _samples_of(found: Iterable[Member], read: Callable[[int, int], bytes]) -> Iterator[RawSample]:
    """Neighbouring members that share the name up to a dot, with their contents."""
    key, held, begin, end = None, {}, 0, 0
    for member in found:
        own_key, ending = split_name(member.name)
        if own_key != key:
            if key is not None:
                yield RawSample(key, held, begin, member.header)
            key, held, begin = own_key, {}, member.header
        held[ending] = read(member.start, member.start + member.size)
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
