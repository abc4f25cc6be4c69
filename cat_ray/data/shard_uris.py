"""The URIs of shards as people write them, or as a shell expands them: a folder and names. Pure."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from braceexpand import UnbalancedBracesError, braceexpand

from cat_ray.data.sources import TAR
from cat_ray.errors import BadInput

# As many shards as a pattern may name.
MOST_SHARDS = 10**6
RANGE, DIGITS = re.compile(r"\{(-?\d+)\.\.(-?\d+)", re.ASCII), 18


def folder_and_names(uris: Sequence[str]) -> tuple[str, list[str]]:
    """The folder of shards that URIs name, and the shards' names; none for all that lie there.

    Args:
        uris: one folder, or tar files of one, with or without braces as in
            `train-{000000..000146}.tar`.

    Raises:
        BadInput: they name several folders, or a file twice.
    """
    if len(uris) == 1 and not uris[0].endswith((TAR, "}")):
        return uris[0], []
    expanded = list(islice(_expanded(uris), MOST_SHARDS + 1))
    if len(expanded) > MOST_SHARDS:
        raise _too_many(uris[0])
    places = [uri.rpartition("/") for uri in expanded]
    if other := [uri for uri in expanded if not uri.endswith(TAR)]:
        raise BadInput(f"{other[0]} is no {TAR} file: give one folder, or the names of tar files")
    folders = list(dict.fromkeys(folder + slash for folder, slash, _ in places))
    if folders[1:]:
        raise BadInput(
            f"{folders[0] or '.'} and {folders[1] or '.'} are two folders: an index tells of the "
            "shards of one"
        )
    names = [name for _, _, name in places]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise BadInput(f"{twice[0]} is named twice: name each shard once")
    return folders[0] if folders[0] == "/" else folders[0].rstrip("/") or ".", names


def _expanded(uris: Iterable[str]) -> Iterable[str]:
    for uri in uris:
        # Held in memory as a whole.
        for first, last in RANGE.findall(uri):
            if max(len(first), len(last)) > DIGITS or abs(int(first) - int(last)) >= MOST_SHARDS:
                raise _too_many(uri)
        try:
            yield from braceexpand(uri)
        except UnbalancedBracesError as error:
            raise BadInput(f"{uri}: its braces don't match ({error})") from error


def _too_many(uri: str) -> BadInput:
    return BadInput(f"{uri} names more than {MOST_SHARDS:,} shards: give their folder")
