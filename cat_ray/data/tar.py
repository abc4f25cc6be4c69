"""The tar files that shards are: members, and the samples that they make up."""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cat_ray.data.tar_header import (
    ABOUT_THE_NEXT,
    BLOCK_BYTES,
    KIND,
    LONGEST_ENTRY_BYTES,
    PLAIN,
    WITHOUT_CONTENT,
    BadHeader,
    Told,
    name_in,
    size_in,
)
from cat_ray.errors import Damaged
from cat_ray.storage import Location

NOTHING = Told()
ZEROS = bytes(BLOCK_BYTES)
SCAN_BYTES = 2**23
# Where most writers put a mark into their headers.
MARK, MARK_PLACE = b"ustar", slice(257, 262)
# What macOS and webdataset's own tools put beside the samples.
MAC_FOLDER, ABOUT_THE_SHARD = "__MACOSX", "__meta__"


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name and where it lies, in bytes, header and content."""

    name: str
    header: int
    start: int
    size: int


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in the shard: member contents by ending, and the bytes that hold it.

    `repeated` names the members that came twice; of two the second counts.
    """

    key: str
    members: dict[str, bytes]
    begin: int = 0
    end: int = 0
    repeated: tuple[str, ...] = ()


def members(content: bytes, name: str, whole: bool = True) -> Iterator[Member]:
    """The files in a tar, or in a run of whole members cut out of one.

    Args:
        content: the bytes.
        name: of the shard, for messages.
        whole: they are a whole tar file, with the zeros at its end.

    Raises:
        Damaged: it is not a tar file, or ends in the middle of one.
    """
    yield from _walk(lambda begin, end: content[begin:end], len(content), name, whole)


def scan(place: Location, begin: int, end: int) -> Iterator[Member]:
    """The files in a whole tar that lies between two bytes of a file, header by header.

    Where members lie is counted from the beginning of the file. Of a store's file much is read at
    once: asking for each header by itself takes longer.

    Raises:
        Damaged: it is not a tar file, ends in the middle of one, or another lies behind it.
        StorageDown: the storage doesn't answer.
    """
    window = _Window(place, begin, end, BLOCK_BYTES if place.local_path else SCAN_BYTES)
    for member in _walk(window.read, end - begin, place.name, whole=True, alone=True):
        yield Member(member.name, begin + member.header, begin + member.start, member.size)


class _Window:
    """Some of a file's bytes from one place to another; they are read on as they are asked for.

    `seen`, if there is one, gets every byte once, in order, as long as no call goes back.
    """

    def __init__(
        self,
        place: Location,
        begin: int,
        end: int,
        window_bytes: int,
        seen: Callable[[bytes], None] | None = None,
    ):
        self._place, self._begin, self._length = place, begin, end - begin
        self._window_bytes, self._seen = window_bytes, seen
        self._at, self._held = 0, b""

    def read(self, first: int, last: int) -> bytes:
        """From one place to another, counted from where the window's part of the file begins."""
        if self._seen is not None:
            self._skip_to(first - self._window_bytes)
        known = self._at + len(self._held)
        if not self._at <= first <= last <= known:
            beyond = min(max(last, first + self._window_bytes), self._length)
            goes_on = self._at <= first <= known + self._window_bytes
            self._load(known if goes_on else first, beyond, keep=first if goes_on else known)
        return self._held[first - self._at : last - self._at]

    def finish(self) -> None:
        """Reads what is left, for `seen`."""
        self._skip_to(self._length)

    def _skip_to(self, place: int) -> None:
        while (known := self._at + len(self._held)) < place:
            self._load(known, min(known + self._window_bytes, place), keep=known)

    def _load(self, begin: int, end: int, keep: int) -> None:
        """Holds the file from one place to another, and what it held before from `keep` on."""
        kept = self._held[keep - self._at :]
        content = self._place.read_range(self._begin + begin, self._begin + end)
        if self._seen is not None:
            self._seen(content)
        self._at, self._held = begin - len(kept), kept + content


def _walk(
    read: Callable[[int, int], bytes], length: int, name: str, whole: bool, alone: bool = False
) -> Iterator[Member]:
    """The files of a tar of so many bytes, which `read` gives from one place to another.

    With `alone` no other tar may lie behind it: its files would be lost without a word.
    """
    at, told = 0, NOTHING
    try:
        while at < length:
            header = read(at, min(at + BLOCK_BYTES, length))
            if header == ZEROS and whole and told.at is None:
                if alone:
                    _check_behind(read, at, length)
                return
            size, kind, start = size_in(header), header[KIND], at + BLOCK_BYTES
            if kind in ABOUT_THE_NEXT:
                end = start + padded(size)
                if size > LONGEST_ENTRY_BYTES or end > length:
                    raise BadHeader(f"an entry of {size:,} bytes at byte {at:,} is too long")
                content = read(start, end)
                if kind == tarfile.GNUTYPE_LONGNAME and content[size:].strip(b"\0"):
                    # tarfile would take all of it, others as much as is told.
                    raise BadHeader(f"the name at byte {start:,} is longer than its header tells")
                told = told.and_also(kind, content[:size], at)
            else:
                own_name = told.name or name_in(header)
                size = size if told.size is None else told.size
                # Before POSIX a folder was told by its name.
                folder = own_name.endswith("/")
                bare = kind in WITHOUT_CONTENT or (folder and kind == tarfile.AREGTYPE)
                end = start + (0 if bare else padded(size))
                if end > length:
                    raise BadHeader(
                        f'it breaks off: member "{own_name}" is truncated at byte {length:,} '
                        f"(declared {end:,})"
                    )
                if kind in PLAIN and not folder:
                    yield Member(own_name, at if told.at is None else told.at, start, size)
                told = NOTHING
            at = end
        if whole or told.at is not None:
            raise BadHeader("it breaks off")
    except BadHeader as error:
        told = f"{error}; copy it again or write it anew (header at byte {at:,})"
        raise Damaged(f"shard {name} is not a whole tar file: {told}") from error


def _check_behind(read: Callable[[int, int], bytes], at: int, length: int) -> None:
    """Looks for the header of another tar in the first bytes behind a tar's end that aren't 0."""
    for begin in range(at, length, padded(SCAN_BYTES)):
        content = read(begin, min(begin + padded(SCAN_BYTES), length))
        if rest := content.lstrip(b"\0"):
            place = (len(content) - len(rest)) // BLOCK_BYTES * BLOCK_BYTES
            if content[place : place + BLOCK_BYTES][MARK_PLACE] == MARK:
                raise BadHeader(
                    f"another one begins behind its end, at byte {begin + place:,}: join tar "
                    "files with `tar -A`, not with `cat`"
                )
            return


def padded(size: int) -> int:
    """The bytes that a content takes up in a tar."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def split_name(name: str) -> tuple[str, str]:
    """A member's name as the key of its sample, up to a dot, and its ending."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}".lstrip("/"), ending.lower()


def sample_name(name: str) -> tuple[str, str] | None:
    """The key and ending of a sample's member; None for what belongs to no sample.

    That is, as for the webdataset library, what has no ending or begins with a dot (LICENSE,
    macOS's `._0000.jpg` and `.DS_Store`), and what tells of the whole shard.
    """
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    if not stem or not ending or stem == ABOUT_THE_SHARD or MAC_FOLDER in folder.split("/"):
        return None
    return split_name(name)


def samples(
    content: bytes, name: str, whole: bool = True, all_members: bool = False
) -> Iterator[RawSample]:
    """The samples of a WebDataset shard: neighbouring members that share the name up to a dot.

    The other arguments and errors are those of `members`. With `all_members` what belongs to no
    sample counts as one of its own: indexes were made so before.
    """
    found = members(content, name, whole)
    naming = split_name if all_members else sample_name
    yield from _samples_of(found, lambda begin, end: content[begin:end], naming)


def read_samples(
    place: Location,
    size: int,
    seen: Callable[[bytes], None] | None = None,
    left_out: Callable[[str], None] = lambda name: None,
    alone: bool = False,
) -> Iterator[RawSample]:
    """The samples of a whole shard, of which no more than some megabytes are held at a time.

    Args:
        place: of the shard.
        size: of the file, in bytes.
        seen: gets all of the file's bytes in order, for a hash.
        left_out: gets the names of members that belong to no sample.
        alone: refuse a shard with another tar behind its end.

    Raises:
        Damaged: it is not a whole tar file.
        StorageDown: the storage doesn't answer.
    """
    window = _Window(place, 0, size, SCAN_BYTES, seen)
    found = _walk(window.read, size, place.name, whole=True, alone=alone)
    yield from _samples_of(found, window.read, sample_name, left_out)
    if seen is not None:
        # The zeros at the end, and what may lie behind them.
        window.finish()


def _samples_of(
    found: Iterable[Member],
    read: Callable[[int, int], bytes],
    naming: Callable[[str], tuple[str, str] | None],
    left_out: Callable[[str], None] = lambda name: None,
) -> Iterator[RawSample]:
    """Neighbouring members that share the name up to a dot, with their contents."""
    key, held, begin, end = None, {}, 0, 0
    repeated: list[str] = []
    for member in found:
        named = naming(member.name)
        if named is None:
            left_out(member.name)
            continue
        own_key, ending = named
        if own_key != key:
            if key is not None:
                yield RawSample(key, held, begin, member.header, tuple(repeated))
            key, held, begin, repeated = own_key, {}, member.header, []
        if ending in held:
            repeated.append(member.name)
        held[ending] = read(member.start, member.start + member.size)
        end = member.start + padded(member.size)
    if key is not None:
        yield RawSample(key, held, begin, end, tuple(repeated))


def sample_extents(place: Location) -> list[int]:
    """Where each sample of a shard begins, and where the last ends, in bytes: `[samples + 1]`.

    Raises:
        Damaged: it is not a whole tar file.
        StorageDown: the storage doesn't answer.
    """
    extents, end = [], 0
    found = scan(place, 0, place.size() or 0)
    for sample in _samples_of(found, lambda begin, end: b"", sample_name):
        extents.append(sample.begin)
        end = sample.end
    return [*extents, end]


def told_of_repeated(sample: RawSample) -> str:
    """What is wrong with a sample some of whose members came twice, and what to do."""
    names = ", ".join(sample.repeated[:2])
    return (
        f"{names} is there twice side by side, so that two samples would become one: give each "
        "sample a name of its own"
    )
