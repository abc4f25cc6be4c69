"""What the names of files and folders say: which hold no samples, and which are splits."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath

from cat_ray.data.decode import IMAGE_ENDINGS

# What operating systems and network disks put beside people's files.
CLUTTER = frozenset(
    {
        "__MACOSX",
        "@eaDir",
        "lost+found",
        "$RECYCLE.BIN",
        "System Volume Information",
        "Thumbs.db",
        "desktop.ini",
    }
)
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval")
NAMED = 5


def clutter(path: str) -> str | None:
    """The part of a path that is hidden or an operating system's, so that no sample lies there."""
    for part in path.split("/"):
        if part.startswith("._"):
            return "._*"
        if part in CLUTTER or (part.startswith(".") and part not in (".", "..")):
            return part
    return None


def is_image(path: str) -> bool:
    """Whether a name ends as that of an image that is read."""
    return path.lower().endswith(tuple(f".{ending}" for ending in IMAGE_ENDINGS))


def ending_of(path: str) -> str:
    """What a name ends with, for a count of what was left out."""
    _, dot, ending = path.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if dot else "without an ending"


def matches(path: str, pattern: str) -> bool:
    """Whether the last parts of a path are as a pattern with `*` and `?` says; "" matches all."""
    return not pattern or PurePosixPath(path).match(pattern)


def splits_of(paths: Iterable[str]) -> dict[str, str]:
    """The splits that files belong to by their names, each with a pattern of its files."""
    found: dict[str, str] = {}
    for path in paths:
        parts = path.split("/")
        for place, part in enumerate(parts):
            words = re.finditer("[A-Za-z]+", part)
            word = next((word for word in words if word[0].lower() in SPLITS), None)
            if word is not None:
                last = place == len(parts) - 1
                # With the dash after it: `test-*` and not `testing-*`.
                begin = part[: word.end() + (part[word.end() : word.end() + 1] in "-_")]
                ending = f".{path.rpartition('.')[2]}"
                rest = [f"{begin}*{ending}"] if last else [part, *["*"] * (len(parts) - place - 1)]
                found.setdefault(word[0].lower(), "/".join([*parts[:place], *rest]))
                break
    return found


def named(names: Collection[str]) -> str:
    """Some names for a message, the first few of many."""
    some = [one_line(name) for name in sorted(names)[:NAMED]]
    return ", ".join(some) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def counted(counts: Mapping[str, int]) -> str:
    """What there is how often, for a message, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{what} ({count:,})" for what, count in ordered)


def one_line(name: str) -> str:
    """A foreign name for a message: it may hold line ends."""
    return name.replace("\n", "\\n").replace("\r", "\\r")
