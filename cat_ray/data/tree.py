"""The files below a source's folder, and what among them can hold no samples."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cat_ray.data.names import clutter, ending_of, matches, splits_of
from cat_ray.data.units import Source
from cat_ray.errors import BadInput, NotFound
from cat_ray.storage import Location
from cat_ray.storage_errors import explain, retry

POINTER, POINTER_BYTES = b"version https://git-lfs", 1024
NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)


@dataclass(frozen=True)
class Tree:
    """What lies below a folder.

    Attributes:
        files: their sizes, by path.
        folders: the names of those directly below.
        lost: the names of links directly below that lead nowhere.
    """

    files: Mapping[str, int]
    folders: tuple[str, ...]
    lost: tuple[str, ...] = ()


def look_below(place: Location, left_out: Counter[str], deep: bool = True) -> Tree:
    """The files below a folder, but for hidden ones and those of operating systems.

    Args:
        place: the folder.
        left_out: gets a count of what was left out, by reason.
        deep: look into the folders below as well.

    Raises:
        BadInput: a name is not UTF-8, or a link leads round in a circle or nowhere.
    """
    if place.local_path is not None:
        return _walk(place, place.local_path, left_out, deep)
    found = place.files_below() if deep else place.sizes()
    files = {name: size for name, size in found.items() if not _is_left_out(name, left_out)}
    return Tree(files, tuple(sorted(f.name for f in place.folders() if not clutter(f.name))))


def files_of(source: Source, ending: str, left_out: Counter[str]) -> dict[str, int]:
    """The files of a source that end so, in the order of their names, with their sizes.

    Where none lies in the folder itself, those in the folders below are taken.

    Raises:
        BadInput: they belong to several splits, such as train and test.
    """
    place = source.place
    if place.name.endswith(ending) and (size := place.size()) is not None:
        _check_has_no_pattern(source)
        return {"": size}
    found_here = Counter[str]()
    tree = look_below(place, found_here, deep=False)
    if source.pattern or not any(name.endswith(ending) for name in tree.files):
        found_here.clear()
        tree = look_below(place, found_here)
    elif tree.folders:
        found_here["folders that were not looked into"] = len(tree.folders)
    check_is_whole(place, tree)
    left_out.update(found_here)
    files = selected(source, tree.files, left_out)
    found = {name: files[name] for name in sorted(files) if name.endswith(ending)}
    left_out.update(ending_of(name) for name in files if name not in found)
    for name, size in found.items():
        check_is_no_pointer(place / name, size)
    return found


def selected(source: Source, files: Mapping[str, int], left_out: Counter[str]) -> dict[str, int]:
    """The files that the source's pattern selects.

    Raises:
        BadInput: it selects none.
    """
    found = {name: size for name, size in files.items() if matches(name, source.pattern)}
    if files and not found:
        raise BadInput(
            f"{source.place.uri}: source.pattern {source.pattern} selects none of {len(files):,} "
            f"files, such as {min(files)}"
        )
    if others := len(files) - len(found):
        left_out["not selected by source.pattern"] += others
    return found


def check_is_whole(place: Location, tree: Tree) -> None:
    """Refuses a folder with links that lead nowhere: each may stand for a class or a shard.

    Raises:
        BadInput: there is one.
    """
    for name in tree.lost:
        to = Path(place.path, name).readlink()
        raise BadInput(
            f"{place.uri}/{name} is a link to {to}, which leads nowhere: restore what it led to, "
            "or remove it; later classes would get other numbers"
        )


def check_is_one_split(source: Source, files: Mapping[str, int]) -> None:
    """Refuses files of several splits: which of them is meant can't be guessed.

    Raises:
        BadInput: there are such.
    """
    splits = splits_of(files)
    if len(splits) > 1:
        pattern = splits.get("train", next(iter(splits.values())))
        raise BadInput(
            f"{source.place.uri} holds several splits: {', '.join(sorted(splits))}. Select one "
            f"with source.pattern, such as {pattern}"
        )


def check_is_no_pointer(place: Location, size: int) -> None:
    """Refuses what Git leaves in place of a large file.

    Raises:
        BadInput: it is such a file.
    """
    if len(POINTER) <= size < POINTER_BYTES and place.read().startswith(POINTER):
        raise BadInput(f"{place.uri} is a Git LFS pointer, not the file itself: run `git lfs pull`")


def _check_has_no_pattern(source: Source) -> None:
    if source.pattern:
        raise BadInput(f"{source.place.uri} is one file: unset source.pattern")


def _walk(place: Location, root: Path, left_out: Counter[str], deep: bool) -> Tree:
    """The files below a folder of this machine, through links, each folder once."""
    files: dict[str, int] = {}
    top: list[str] = []
    lost: list[str] = []
    start = os.path.realpath(root)
    reached = {start: "."}
    waiting = [("", root, start)]
    while waiting:
        above, folder, real = waiting.pop()
        for entry in retry(partial(_entries, folder), place.retry_seconds):
            name = f"{above}{entry.name}"
            if _is_left_out(entry.name, left_out):
                continue
            found = _facts(entry)
            if found is None and not above:
                lost.append(name)
            elif found is None:
                left_out["links that lead nowhere"] += 1
            elif stat.S_ISREG(found.st_mode):
                files[name] = found.st_size
            elif not stat.S_ISDIR(found.st_mode):
                left_out["neither files nor folders"] += 1
            else:
                if not above:
                    top.append(name)
                if deep:
                    link = entry.is_symlink()
                    own = os.path.realpath(entry.path) if link else f"{real}/{entry.name}"
                    if link and any(Path(inner).is_relative_to(own) for inner in (start, real)):
                        raise BadInput(
                            f"{entry.path} is a link back to a folder in which it lies: remove it"
                        )
                    if (other := reached.setdefault(own, name)) != name:
                        raise BadInput(
                            f"{place.uri}: {other} and {name} are the same folder, by a link: its "
                            "images would come twice. Remove the link"
                        )
                    waiting.append((f"{name}/", Path(entry.path), own))
    return Tree(files, tuple(sorted(top)), tuple(sorted(lost)))


def _facts(entry: os.DirEntry[str]) -> os.stat_result | None:
    """What the operating system knows of a file, or of what a link leads to; None if to nothing."""
    try:
        return entry.stat()
    except OSError as error:
        if entry.is_symlink() and error.errno in NOWHERE:
            return None
        raise explain(error, entry.path, local=True) from error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except FileNotFoundError as error:
        raise NotFound(f"{folder} doesn't exist") from error
    except OSError as error:
        raise explain(error, str(folder), local=True) from error
    for entry in found:
        try:
            entry.name.encode()
        except UnicodeEncodeError as error:
            told = os.fsencode(entry.name).decode(errors="backslashreplace")
            raise BadInput(
                f"{folder} holds a name that is not UTF-8, {told}: rename it, as "
                "`convmv -f latin1 -t utf8 -r --notest` does"
            ) from error
    return found


def _is_left_out(path: str, left_out: Counter[str]) -> bool:
    part = clutter(path)
    if part is not None:
        left_out[part] += 1
    return part is not None
