"""How long a run stands still when nodes go and come: measured by drills, or read off a run."""

import statistics
from dataclasses import dataclass, replace
from itertools import pairwise

from cat_ray.errors import BadInput
from cat_ray.operations.goodput import Group, Row, groups_of, read_ledger
from cat_ray.operations.journal import read_rows
from cat_ray.storage import Location


@dataclass(frozen=True)
class RecoveryTimes:
    """Seconds from what happened to the end of the first new step.

    The defaults are medians of 5 or 6 drills each on a job of 0.12 million parameters, two CPU
    cores, 24 November 2026 (README, "On a cluster that shrinks and grows"), by

        cat-ray drill jobs/quickstart.yaml --set run.total_images=4800 \\
            --set checkpoints.save_every_images=320 --set workers.minimum=1 \\
            --schedule remove@640:1,add@1280,drain@3200:1

    Reading and writing a checkpoint of a large model comes on top: `save_size.SaveTimes`.

    Attributes:
        killed: a node is gone without notice.
        drained: a node was told to go.
        joined: a node came.
        source: where the figures come from.
        of_drills: whether of a small job, so that reading a large checkpoint comes on top.
    """

    killed: float = 11.2
    drained: float = 9.3
    joined: float = 16.3
    source: str = "drills on two CPU cores, 24 November 2026"
    of_drills: bool = True


@dataclass(frozen=True)
class Measured:
    """What a run's own files tell.

    Attributes:
        times: its recoveries; the drills' where it had none of a kind.
        stall_seconds: median of its saves, None if it had none.
        stored_seconds: likewise, until a checkpoint was complete.
    """

    times: RecoveryTimes
    stall_seconds: float | None
    stored_seconds: float | None


def measured_by(run: Location) -> Measured:
    """Reads a run's ledger and journal.

    Raises:
        BadInput: it has no ledger, or its storage doesn't answer.
    """
    rows = read_ledger(run)
    if not rows:
        raise BadInput(f"--measured {run.uri}: it has no ledger, is it the folder of a run?")
    saves = [row for row in read_rows(run) if row.get("kind") == "checkpoint"]

    def median(name: str) -> float | None:
        return statistics.median(save[name] for save in saves) if saves else None

    return Measured(recovery_times(rows, run.uri), median("stall_seconds"), median("seconds"))


def recovery_times(rows: list[Row], name: str) -> RecoveryTimes:
    """The medians of what lies between a group's last sign of life and the next one's first step.

    Without notice the fault comes some time after that last sign: these are upper bounds.
    """
    found: dict[str, list[float]] = {"killed": [], "drained": [], "joined": []}
    for group, later in pairwise(groups_of(rows)):
        stepped = _first_step(later)
        if group.session == later.session and stepped is not None:
            found[_kind(group, later)].append(stepped - group.ended)
    medians = {kind: statistics.median(each) for kind, each in found.items() if each}
    counts = ", ".join(f"{len(each)} {kind}" for kind, each in found.items())
    source = f"{name}: {counts}; drills for the rest"
    return replace(RecoveryTimes(), **medians, source=source, of_drills=not medians)


def _first_step(group: Group) -> float | None:
    start = min(row.images for rows in group.rows for row in rows)
    ends = [row.at for rows in group.rows for row in rows if row.images > start]
    return min(ends, default=None)


def _kind(group: Group, later: Group) -> str:
    last = [rows[-1].outcome for rows in group.rows if rows]
    if len(last) < group.workers or any(outcome != "yielded" for outcome in last):
        return "killed"
    return "joined" if later.workers > group.workers else "drained"
