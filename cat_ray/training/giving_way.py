"""How a worker group ends itself between two steps: what is saved before, and what is said."""

from collections.abc import Sequence
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
class Situation:
    """What one worker knows when its group is to give way."""

    notice: Notice | None
    times: SaveTimes


def decide(
    situations: Sequence[Situation], cause: str, margin: float, now: float
) -> tuple[SaveChoice, str]:
    """Which save fits, and the line that tells the user; `now` in unix seconds."""
    notices = [s.notice for s in situations if s.notice is not None]
    notice = earliest(notices) if cause == "preemption" else None
    left = None if notice is None or notice.deadline is None else notice.deadline - now
    choice = choose_save(longest([s.times for s in situations]), left, margin)
    reasons = {
        "preemption": notice.reason if notice else "a machine is taken away",
        "resize": "the number of nodes changed",
        "stop": "asked to stop",
    }
    what = {"storage": "saving", "peer": "handing over", "none": "not saving"}[choice.kind]
    return choice, f"{reasons[cause]}: {what}, {choice.why}"


def longest(times: Sequence[SaveTimes]) -> SaveTimes:
    """The longest that any worker measured."""

    def most(values: Sequence[float | None]) -> float | None:
        return max((value for value in values if value is not None), default=None)

    return SaveTimes(
        most([t.local_seconds for t in times]), most([t.storage_seconds for t in times])
    )
