"""Files of one JSON value a line: written by one writer, read by whoever looks on."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from cat_ray.operations.telling import Tell, at_once
from cat_ray.storage import Location
from cat_ray.storage_errors import explain

T = TypeVar("T")

logger = logging.getLogger(__name__)


def read_lines(place: Location, parse: Callable[[bytes], T]) -> list[T]:
    """What each line of a file holds, none if there is no such file.

    A damaged line is left out, and a warning names it; but for a last one without its end, which
    is still being written.

    Args:
        place: of the file.
        parse: a line; it raises `ValueError` for one that is damaged.
    """
    if not place.exists():
        return []
    values = []
    for number, line in enumerate(place.read().split(b"\n")[:-1], start=1):
        try:
            values.append(parse(line))
        except ValueError as error:
            _warn_once(f"{place.uri}: line {number} is damaged ({str(error).splitlines()[0]})")
    return values


@cache
def _warn_once(told: str) -> None:
    # A running job's files are read again and again.
    logger.warning("%s, left out", told)


class Lines:
    """A file that one writer adds lines to: in place on a disk, whole to an object store.

    Args:
        place: of the file.
        tell: does the writing.
        kept: what it begins with.
        every_seconds: how often an object store gets it at most.
    """

    def __init__(
        self, place: Location, tell: Tell = at_once, kept: bytes = b"", every_seconds: float = 0.0
    ):
        self._place, self._tell, self._every_seconds = place, tell, every_seconds
        self._content = bytearray(kept)

    def append(self, line: str) -> None:
        """Adds a line, given without its end."""
        content = line.encode() + b"\n"
        local = self._place.local_path
        if local is not None:
            self._tell(lambda: append(local, content))
            return
        self._content += content
        self._tell(lambda: self._place.write(bytes(self._content)), self, self._every_seconds)


def append(path: Path, content: bytes) -> None:
    """Adds to a local file, all or nothing.

    Raises:
        StorageFull: there is no space left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            end, left = file.tell(), memoryview(content)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                if file.tell() > end:
                    file.truncate(end)
                raise
    except OSError as error:
        raise explain(error, str(path), local=True) from error
