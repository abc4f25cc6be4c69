"""What a worker knows of its machine being taken away, and which save still fits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Event, Thread
from typing import Literal, Protocol, Self


@dataclass(frozen=True)
class Notice:
    """A machine is going to be taken away.

    reason: who takes it and why, in plain words.
    deadline: unix time in seconds until when it is there for certain; None: nobody told one.
    """

    reason: str
    deadline: float | None


def earliest(notices: Iterable[Notice]) -> Notice | None:
    """The notice with the earliest deadline, the first of equal ones; None: there is none.

    A notice with a deadline goes before those without.
    """

    def deadline(notice: Notice) -> float:
        return math.inf if notice.deadline is None else notice.deadline

    return min(notices, key=deadline, default=None)


class CloudSource(Protocol):
    """Something that can be asked whether this machine is going to be taken away."""

    def poll(self) -> Notice | None:
        """What is known now; None: nothing."""


class NoticeBoard:
    """The notices of one worker process, for all of its threads and its signal handlers."""

    def __init__(self) -> None:
        # No lock: a signal handler may post while the very thread it interrupts reads, and would
        # wait for itself. Adding to a list and going through one are safe without.
        self._notices: list[Notice] = []

    def post(self, notice: Notice) -> None:
        """Adds a notice; the same one again changes nothing."""
        if notice not in self._notices:
            self._notices.append(notice)

    def current(self) -> Notice | None:
        """The one with the earliest deadline, the first posted of equal ones; None: none."""
        return earliest(self._notices)

    def clear(self) -> None:
        """Forgets all notices so far."""
        self._notices = []


class Poller:
    """Polls a source from a thread of its own, at once and then every so many seconds.

    Runs between entering and leaving a `with`, which waits for a poll in progress; nothing is
    posted afterwards. An exception that the source lets through ends the thread and is printed.
    """

    def __init__(self, source: CloudSource, board: NoticeBoard, poll_seconds: float):
        self._source = source
        self._board = board
        self._poll_seconds = poll_seconds
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="preemption-notices", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            notice = self._source.poll()
            if notice is not None:
                self._board.post(notice)
            self._stopped.wait(self._poll_seconds)


@dataclass(frozen=True)
class SaveTimes:
    """The longest of this run's recent saves, in seconds; None: not measured yet.

    local_seconds: until a worker's part lay outside its process, on this or another machine.
    storage_seconds: until every worker's part and the manifest lay in storage.
    """

    local_seconds: float | None
    storage_seconds: float | None


@dataclass(frozen=True)
class SaveChoice:
    """What to do before a machine goes.

    kind: "storage": every worker uploads its own part, and the manifest commits.
        "peer": the workers that leave hand their parts over to workers that stay.
        "none": nothing; the previous checkpoint stands.
    why: one sentence with the numbers.
    """

    kind: Literal["storage", "peer", "none"]
    why: str


def choose_save(times: SaveTimes, seconds_left: float | None, margin: float) -> SaveChoice:
    """The most lasting save that ends in time.

    A save fits if its measured time, `margin` times over, is left. Before the first measurement
    a save to storage is tried: an unfinished one harms nothing.

    Args:
        times: how long saves have taken.
        seconds_left: until the deadline, not positive if it has passed; None: no deadline is
            known, and a save to storage is tried.
        margin: how many times over a measured time has to fit.
    """
    if seconds_left is None:
        return SaveChoice("storage", "no deadline is known")
    storage, local = times.storage_seconds, times.local_seconds
    left = f"{_words(max(seconds_left, 0))} are left"
    if storage is None:
        return SaveChoice("storage", f"no save has been measured yet, {left}")
    why = f"a save to storage takes {_measured(storage, storage * margin)}"
    if storage * margin <= seconds_left:
        return SaveChoice("storage", f"{why}, {left}")

    if local is None:
        return SaveChoice("none", f"{why}, handing over has not been measured yet, {left}")
    why = f"{why}, handing over {_measured(local, local * margin)}"
    return SaveChoice("peer" if local * margin <= seconds_left else "none", f"{why}, {left}")


def partners(world_size: int, leaving: frozenset[int]) -> dict[int, int]:
    """For each leaving rank the staying one that takes its part.

    None takes two parts more than another. Few partners are spread over all staying ranks:
    neighbours share a machine, and its network.

    Raises:
        ValueError: nobody stays.
    """
    staying = [rank for rank in range(world_size) if rank not in leaving]
    if not staying:
        raise ValueError(f"all {world_size} workers leave: none can take over another's part")
    return {
        rank: staying[place * len(staying) // len(leaving)]
        for place, rank in enumerate(sorted(leaving))
    }


def _words(seconds: float) -> str:
    return f"{round(seconds, 1):g} s"


def _measured(seconds: float, with_margin: float) -> str:
    return f"{_words(seconds)} (measured; {_words(with_margin)} with the margin)"
