"""Probes a place in storage: writes a little, reads, lists and deletes it, and leaves nothing."""

import contextlib
import os
import time
from collections.abc import Iterator

from cat_ray.data.index import INDEX_NAME
from cat_ray.doctor.facts import Trial
from cat_ray.errors import ExpectedError
from cat_ray.storage import Location

PROBE_BYTES = 2**23


@contextlib.contextmanager
def cleared(folder: Location, left_behind: list[str]) -> Iterator[None]:
    """Takes folders away again that came into being in the block, if they are empty.

    Args:
        folder: the place that is probed.
        left_behind: gets what couldn't be taken away.
    """
    try:
        absent = list(_absent(folder))
    except ExpectedError:
        # The trials will say why.
        absent = []
    try:
        yield
    finally:
        try:
            for place in absent:
                if place.is_folder() and not place.files_below() and not place.folders():
                    _remove(place)
        except ExpectedError:
            left_behind.append(place.uri)


def _absent(folder: Location) -> Iterator[Location]:
    """The folder and those that it lies in, from the innermost, as far as there are none yet."""
    place: Location | None = folder
    while place is not None and not place.is_folder():
        yield place
        place = place.parent


def _remove(empty: Location) -> None:
    if empty.local_path is None:
        empty.delete_folder()
        return
    # Not as on object stores: this never takes away what somebody has put there by now.
    with contextlib.suppress(OSError):
        empty.local_path.rmdir()


class Probing:
    """One trial: the steps that went well so far, and the one under way."""

    def __init__(self, node: str):
        self.node, self.step = node, "list"
        self.write_rate = self.read_rate = self.list_seconds = None

    def trial(self, reason: str = "") -> Trial:
        refused = self.step if reason else ""
        return Trial(self.node, self.write_rate, self.read_rate, self.list_seconds, refused, reason)


def try_writing(node: str, folder: Location, name: str, mark: str) -> Trial:
    """Writes a file of random bytes, reads it back, lists and deletes it.

    Args:
        node: who tries, for the record.
        folder: where.
        name: of the file: none may have it.
        mark: a file that the driver has put there, which must be seen.
    """
    probing, probe = Probing(node), folder / name
    content = os.urandom(PROBE_BYTES)
    try:
        probing.step = "write"
        begun = time.perf_counter()
        probe.write(content)
        probing.write_rate = PROBE_BYTES / (time.perf_counter() - begun)
        probing.step = "read"
        begun = time.perf_counter()
        if probe.read() != content:
            return probing.trial("other bytes came back than were written")
        probing.read_rate = PROBE_BYTES / (time.perf_counter() - begun)
        probing.step = "list"
        begun = time.perf_counter()
        listed = folder.sizes()
        probing.list_seconds = time.perf_counter() - begun
        if listed.get(name) != PROBE_BYTES:
            return probing.trial("what was just written is not listed")
        probing.step = "see"
        if mark not in listed:
            return probing.trial("what the driver wrote there is not to be seen here")
        probing.step = "delete"
        probe.delete()
        return probing.trial()
    except ExpectedError as error:
        return probing.trial(str(error))
    finally:
        take_away(probe)


def take_away(probe: Location) -> bool:
    """Whether nothing is left of a probe, in place or half written."""
    try:
        if probe.local_path is not None:
            for path in probe.local_path.parent.glob(f"*{probe.name}*"):
                path.unlink()
        else:
            probe.delete()
    except (ExpectedError, OSError):
        return False
    return True


def try_reading(node: str, folder: Location) -> Trial:
    """Lists a folder of shards and reads the beginning of its largest file; writes nothing."""
    probing = Probing(node)
    try:
        begun = time.perf_counter()
        sizes = folder.sizes()
        probing.list_seconds = time.perf_counter() - begun
        if INDEX_NAME not in sizes:
            return probing.trial(f"there is no {INDEX_NAME}")
        probing.step = "read"
        largest = max(sizes, key=lambda name: sizes[name])
        count = min(PROBE_BYTES, sizes[largest])
        begun = time.perf_counter()
        (folder / largest).read_range(0, count)
        probing.read_rate = count / (time.perf_counter() - begun)
        return probing.trial()
    except ExpectedError as error:
        return probing.trial(str(error))
