"""The goodput ledger: every worker-second that a run paid for lands in exactly one bin.

Workers write down what only they know, as they go. What a failure cost shows afterwards, when the
rows of all workers lie side by side: then `lost` and `idle` are derived.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal, get_args

from pydantic import Field, FiniteFloat, TypeAdapter

from cat_ray.operations.lines import Lines, read_lines
from cat_ray.operations.telling import Tell, at_once
from cat_ray.storage import Location

LEDGER = "ledger"
UPLOAD_SECONDS = 10.0
AWAY_SECONDS = 600.0

Bin = Literal["train", "data_wait", "save_stall", "start", "evaluation"]
AnyBin = Literal[Bin, "lost", "idle"]
Outcome = Literal["finished", "yielded", "failed"]

BINS: tuple[Bin, ...] = get_args(Bin)
ALL_BINS: tuple[AnyBin, ...] = get_args(AnyBin)

# A row is read from a file that anybody may have changed.
MOST_WORKERS, MOST_IMAGES = 1_000_000, 2**63

_CLOCK_OFFSET = time.time() - time.monotonic()


def unix_time() -> float:
    """Unix time in seconds that never goes back, even if this machine's clock is set back."""
    return _CLOCK_OFFSET + time.monotonic()


@dataclass(frozen=True)
class Row:
    """What one worker has spent up to a moment.

    Attributes:
        group: name of the worker group.
        rank: which of its workers.
        workers: how many it has.
        began: when the group's start began, unix time.
        at: when the row was written, unix time.
        images: images of the run seen by then.
        seconds: spent in each bin since `began`; together they are `at - began`.
        outcome: how the worker ended, in its last row.
        session: the call of the command that it belongs to.
    """

    group: str
    rank: Annotated[int, Field(ge=0)]
    workers: Annotated[int, Field(gt=0, le=MOST_WORKERS)]
    began: FiniteFloat
    at: FiniteFloat
    images: Annotated[int, Field(ge=0, lt=MOST_IMAGES)]
    seconds: dict[Bin, FiniteFloat]
    outcome: Outcome | None = None
    session: str = ""


_ROW = TypeAdapter(Row)


class Ledger:
    """The rows of one worker of one worker group, from one thread.

    Time outside of any block counts as `start` at first, and as `train` after `started`. On an
    object store the file is put there whole, at most every `UPLOAD_SECONDS` and at the end.

    Args:
        run: the run's folder.
        group: the worker group's name, unlike that of any other group of the run.
        rank: this worker's place in the group.
        workers: how many the group has.
        images: images of the run that the group goes on from.
        began: when the driver began to start the group, unix time; now without it.
        clock: unix time in seconds; it must not go back.
        session: the call of the command, which may start several groups.
        tell: writes the rows; by default at once, with the storage's errors.
    """

    def __init__(
        self,
        run: Location,
        group: str,
        rank: int,
        workers: int,
        images: int,
        began: float | None = None,
        clock: Callable[[], float] = unix_time,
        session: str = "",
        tell: Tell = at_once,
    ):
        self._clock = clock
        now = clock()
        # The driver's clock may be ahead of this machine's.
        self._since = now if began is None else min(began, now)
        self._seconds: dict[Bin, float] = dict.fromkeys(BINS, 0.0)
        self._open: list[Bin] = ["start"]
        self._row = Row(group, rank, workers, self._since, self._since, images, {}, session=session)
        place = run / LEDGER / f"{group}-{rank:04d}.jsonl"
        self._lines = Lines(place, tell, every_seconds=UPLOAD_SECONDS)
        self._append(images)

    def started(self) -> None:
        """Start-up and restore are over: training begins."""
        self._count()
        self._open[0] = "train"
        self._append(self._row.images)

    @contextmanager
    def spending(self, bin: Bin) -> Iterator[None]:
        """Time inside goes to a bin, but for the time of blocks further inside."""
        self._count()
        self._open.append(bin)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def note(self, images: int) -> None:
        """Writes down the time spent so far and the images of the run seen with it.

        After a failure, time is split between kept and lost by these rows: right after a save, one
        makes the split exact.
        """
        self._append(images)

    def close(self, images: int, outcome: Outcome) -> None:
        """Writes the last row: what was seen, and how it ended."""
        self._append(images, outcome)

    def _count(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def _append(self, images: int, outcome: Outcome | None = None) -> None:
        self._count()
        self._row = replace(
            self._row,
            at=self._since,
            images=images,
            seconds=dict(self._seconds),
            outcome=outcome,
        )
        self._lines.append(json.dumps(asdict(self._row)))


def read_ledger(run: Location) -> list[Row]:
    """The rows of all workers of a run, none if there is no ledger yet.

    A damaged line is left out, and a warning names it.
    """
    folder = run / LEDGER
    names = sorted(name for name in folder.sizes() if name.endswith(".jsonl"))
    return [row for name in names for row in read_lines(folder / name, _parse_row)]


def _parse_row(content: bytes) -> Row:
    row = _ROW.validate_json(content)
    # An older version may know fewer bins.
    return replace(row, seconds={**dict.fromkeys(BINS, 0.0), **row.seconds})


@dataclass(frozen=True)
class Group:
    """A worker group as its workers' rows tell it.

    Attributes:
        workers: how many it had.
        began: unix time.
        ended: its last sign of life, or the beginning of the next group; unix time.
        start: images of the run that it went on from.
        images: images of the run at its last sign of life.
        kept: work on images beyond these was done again by a later group.
        session: the call of the command that it belongs to.
        rows: each worker's rows, in order of time; none of a worker that died before its first.
    """

    workers: int
    began: float
    ended: float
    start: int
    images: int
    kept: float
    session: str
    rows: tuple[tuple[Row, ...], ...]

    @property
    def lost_images(self) -> int:
        """Images that it trained on and a later group did again, as far as it wrote them down."""
        return int(max(0, self.images - max(self.start, self.kept)))


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """The worker groups of a run, in order of time."""
    named: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.at):
        named[row.group].append(row)
    groups: list[Group] = []
    next_began, kept = math.inf, math.inf
    for members in sorted(named.values(), key=_began, reverse=True):
        workers = members[0].workers
        groups.append(
            Group(
                workers=workers,
                began=_began(members),
                ended=min(members[-1].at, next_began),
                start=min(row.images for row in members),
                images=max(row.images for row in members),
                kept=kept,
                session=members[0].session,
                rows=tuple(
                    tuple(row for row in members if row.rank == rank) for rank in range(workers)
                ),
            )
        )
        next_began = _began(members)
        kept = min(kept, groups[-1].start)
    return groups[::-1]


def account(groups: Sequence[Group], away_seconds: float = AWAY_SECONDS) -> dict[AnyBin, float]:
    """The worker-seconds of every bin.

    Between two groups the workers of the later one are `idle`, unless it is longer than
    `away_seconds`, or the command was not running: then nobody was paid for.
    """
    total: dict[AnyBin, float] = dict.fromkeys(ALL_BINS, 0.0)
    for group in groups:
        for rows in group.rows:
            for name, seconds in _worker_account(group, rows).items():
                total[name] += seconds
    for group, later in pairwise(groups):
        gap = later.began - group.ended
        if gap <= away_seconds and group.session == later.session:
            total["idle"] += gap * later.workers
    return total


def _worker_account(group: Group, rows: Sequence[Row]) -> dict[AnyBin, float]:
    """One worker's seconds from the group's beginning to its end."""
    total: dict[AnyBin, float] = dict.fromkeys(ALL_BINS, 0.0)
    if not rows:
        total["start"] = group.ended - group.began
        return total
    first, last = rows[0], rows[-1]
    total["start"] = min(first.began, group.ended) - group.began
    nothing = replace(first, at=first.began, seconds=dict.fromkeys(BINS, 0.0), outcome=None)
    for before, row in pairwise((nothing, *rows)):
        counted = _share_until(group.ended, before.at, row.at)
        # What led to a failure was not kept, wherever the next group went on from.
        kept_images = -math.inf if row.outcome == "failed" else group.kept
        kept = _share_until(kept_images, before.images, row.images)
        for name in BINS:
            spent = row.seconds[name] - before.seconds[name]
            own = counted if name == "start" else min(counted, kept)
            total[name] += own * spent
            total["lost"] += (counted - own) * spent
    rest = max(0.0, group.ended - last.at)
    total["idle" if last.outcome in ("finished", "yielded") else "lost"] += rest
    return total


def _share_until(place: float, start: float, stop: float) -> float:
    """Which part of the way from `start` to `stop` comes before a place."""
    if stop <= start:
        return float(start <= place)
    return min(1.0, max(0.0, (place - start) / (stop - start)))


def _began(rows: Sequence[Row]) -> float:
    return min(row.began for row in rows)
