"""What lies in a tar that may be a sample: its members, and how WebDataset groups them."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cat_ray.data.names import clutter, ending_of
from cat_ray.data.tar import Member, padded, scan, split_name
from cat_ray.errors import BadInput, Damaged
from cat_ray.storage import Location

TAIL_BYTES = 2**20
LINKS = "links in tar files (pack them with tar --hard-dereference -h)"


@dataclass(frozen=True)
class Group:
    """A sample's members by their endings, and the bytes from the first to behind the last."""

    key: str
    members: dict[str, Member]
    begin: int
    end: int


def listed(place: Location, begin: int, end: int, left_out: Counter[str]) -> Iterator[Member]:
    """The files of a tar that lies between two bytes of a file, and a count of what isn't one.

    Raises:
        BadInput: it is not a whole tar file.
    """
    at = begin
    for member in scan(place, begin, end):
        if member.header > at:
            left_out.update(_between(place, at, member.header))
        at = member.start + padded(member.size)
        part = clutter(member.name)
        if part is None:
            yield member
        else:
            left_out[part] += 1
    # Behind the last file there may be links, and then zeros, seldom many.
    left_out.update(_between(place, at, min(end, at + TAIL_BYTES)))


def grouped(members: Iterable[Member], shard: str, left_out: Counter[str]) -> Iterator[Group]:
    """Samples: neighbouring members of the same name up to a dot.

    Raises:
        BadInput: a member comes twice, so that one of two samples would be lost.
    """
    key, held = None, dict[str, Member]()
    for member in members:
        own_key, ending = split_name(member.name)
        base = own_key.rpartition("/")[2]
        # So does the webdataset library.
        about_the_shard = base.startswith("__") and base.endswith("__")
        if not ending or about_the_shard or clutter(member.name):
            left_out[f"{base}.{ending}" if about_the_shard else ending_of(member.name)] += 1
            continue
        if own_key != key:
            if key is not None:
                yield _group(key, held)
            key, held = own_key, {}
        if ending in held:
            raise BadInput(
                f"shard {shard} holds {member.name} twice, one after the other: give every sample "
                "a name of its own, with its folder if need be"
            )
        held[ending] = member
    if key is not None:
        yield _group(key, held)


def _group(key: str, members: dict[str, Member]) -> Group:
    last = max(members.values(), key=lambda member: member.start)
    first = min(members.values(), key=lambda member: member.header)
    return Group(key, members, first.header, last.start + padded(last.size))


def _between(place: Location, begin: int, end: int) -> Counter[str]:
    """The links among what lies between two files of a tar."""
    content = io.BytesIO(place.read_range(begin, end))
    try:
        with tarfile.open(fileobj=content, mode="r:") as between:
            links = sum(info.islnk() or info.issym() for info in between)
    except tarfile.TarError as error:
        raise Damaged(f"{place.uri} is no whole tar file at byte {begin:,}: {error}") from error
    return Counter({LINKS: links} if links else {})
