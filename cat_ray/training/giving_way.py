"""How a worker group ends itself between two steps: what is saved before, and what is said."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cat_ray.training.preemption import (
    Notice,
    SaveChoice,
    SaveTimes,
    choose_save,
    earliest,
)

WISHES = ("preemption", "stop", "resize")


@dataclass(frozen=True)
class Decision:
    """What the group does: why it ends, which save it makes before, and what is said of it."""

    cause: str
    choice: SaveChoice
    told: str


@dataclass(frozen=True)
class Situation:
    """What one worker knows when its group is to give way.

    Attributes:
        notice: that its machine will be taken away.
        times: how long its saves took.
        node: its machine: a notice to one worker is one to all workers there.
        with_driver: whether that is the driver's too.
    """

    notice: Notice | None
    times: SaveTimes
    node: str
    with_driver: bool


def decide(situations: Sequence[Situation], cause: str, margin: float, now: float) -> Decision:
    """What to do; `now` in unix seconds. A run whose driver's machine goes can only stop."""
    notice = earliest(s.notice for s in situations if s.notice is not None)
    if notice is None:
        reason = {"resize": "the number of nodes changed", "stop": "asked to stop"}[cause]
        return Decision(cause, SaveChoice("storage", reason), f"{reason}: saving")
    left = None if notice.deadline is None else notice.deadline - now
    choice = choose_save(longest(s.times for s in situations), left, margin)
    gone = leaving(situations)
    if choice.kind == "peer" and len(gone) == len(situations):
        choice = SaveChoice("none", f"{choice.why}, and no worker stays")
    what = {"storage": "saving", "peer": "handing over", "none": "not saving"}[choice.kind]
    ends = any(situations[rank].with_driver for rank in gone)
    told = f"{notice.reason}: {what}, {choice.why}"
    return Decision("stop" if ends else cause, choice, told)


def leaving(situations: Sequence[Situation]) -> frozenset[int]:
    """The ranks whose machines will be taken away."""
    nodes = {s.node for s in situations if s.notice is not None}
    return frozenset(rank for rank, s in enumerate(situations) if s.node in nodes)


def longest(times: Iterable[SaveTimes]) -> SaveTimes:
    """The longest of what was measured."""
    measured = list(times)

    def most(values: Iterable[float | None]) -> float | None:
        return max((value for value in values if value is not None), default=None)

    return SaveTimes(
        most(t.local_seconds for t in measured), most(t.storage_seconds for t in measured)
    )
