"""The URIs of shards as people write them, or as a shell expands them: a folder and names. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from braceexpand import UnbalancedBracesError, braceexpand

from cat_ray.data.sources import TAR
from cat_ray.errors import BadInput

# As many shards as a pattern may name.
MOST_SHARDS = 10**6


def folder_and_names(uris: Sequence[str]) -> tuple[str, list[str]]:
    """The folder of shards that URIs name, and the shards' names; none for all that lie there.

    Args:
        uris: one folder, or tar files of one, with or without braces as in
            `train-{000000..000146}.tar`.

    Raises:
        BadInput: they name several folders, or a file twice.
    """
    if len(uris) == 1 and not uris[0].endswith(TAR):
        return uris[0], []
    expanded = list(islice(_expanded(uris), MOST_SHARDS + 1))
    if len(expanded) > MOST_SHARDS:
        raise BadInput(f"{uris[0]} names more than {MOST_SHARDS:,} shards: give their folder")
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
        try:
            yield from braceexpand(uri)
        except UnbalancedBracesError as error:
            raise BadInput(f"{uri}: its braces don't match ({error})") from error
