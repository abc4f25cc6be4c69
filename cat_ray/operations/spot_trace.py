"""Traces of how many nodes a spot market gave, and the changes that a run on them sees.

A trace is a CSV file: `seconds,nodes`, rows in order of time from 0 on, each the number of nodes
that are there from that second on; the last row only says when the trace ends. Lines that begin
with # are comments. The JSON files of github.com/skypilot-org/spot-traces (spot machines on AWS in
2022 and 2023, for "Can't Be Late", NSDI 2024) are read as they are.

A run that is longer than the trace goes through it again and again. A run that wants more nodes
than the trace ever has takes several copies of it, each begun at another place, so that
interruptions of a node stay as frequent as they were; of fewer nodes it is drawn by chance which of
them go.
"""

import csv
import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cat_ray.errors import BadInput
from cat_ray.json_text import parse_object

HEADER = ["seconds", "nodes"]
# A run goes through a trace again and again: a shorter one would never bring it to its end.
SHORTEST_SECONDS, MOST_NODES = 60.0, 1_000_000


@dataclass(frozen=True)
class Trace:
    """Nodes over time: `nodes[i]` from `seconds[i]` on, until `end`."""

    seconds: tuple[float, ...]
    nodes: tuple[int, ...]
    end: float

    @property
    def most(self) -> int:
        """The most nodes that it ever has."""
        return max(self.nodes)

    @property
    def interruptions_per_node_hour(self) -> float:
        """Nodes that go, for each hour that a node is there."""
        pairs = list(itertools.pairwise(self.nodes))
        ends = [*self.seconds[1:], self.end]
        hours = sum(
            count * (end - start)
            for count, start, end in zip(self.nodes, self.seconds, ends, strict=True)
        )
        return sum(max(0, a - b) for a, b in pairs) * 3600 / hours if hours else 0.0


@dataclass(frozen=True)
class Change:
    """Some of a run's nodes go or others come.

    Attributes:
        at: seconds since the beginning.
        lost: how many of those it had go.
        nodes: how many it has from then on.
    """

    at: float
    lost: int
    nodes: int


def read_trace(path: str) -> Trace:
    """A trace from a file.

    Raises:
        BadInput: there is no such file, or it isn't a trace.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"can't read the trace {path}: {error}") from error
    try:
        return _from_json(text) if text.lstrip().startswith("{") else _from_csv(text)
    except (ValueError, KeyError, TypeError, OverflowError, IndexError, csv.Error) as error:
        raise BadInput(
            f"{path} is no trace: {error}. Write seconds,nodes in order of time, from 0 on"
        ) from error


def to_csv(trace: Trace, comment: str) -> str:
    """The trace's file."""
    rows = [*zip(trace.seconds, trace.nodes, strict=True), (trace.end, trace.nodes[-1])]
    lines = [f"# {line}" for line in comment.splitlines()]
    return "\n".join([*lines, ",".join(HEADER), *(f"{at:g},{count}" for at, count in rows), ""])


def synthetic_trace(
    nodes: int, interruptions_per_node_hour: float, away_seconds: float, hours: float, seed: int
) -> Trace:
    """A trace in which nodes go one by one, by chance, and come back after a fixed time.

    Each node that is there goes with the same rate at any moment (a Poisson process).
    """
    draw = np.random.default_rng(seed)
    end, at, present = hours * 3600, 0.0, nodes
    returns: list[float] = []
    seconds, counts = [0.0], [nodes]
    while True:
        rate = present * interruptions_per_node_hour / 3600
        goes = at + draw.exponential(1 / rate) if rate else math.inf
        comes = returns[0] if returns else math.inf
        at = min(goes, comes)
        if at >= end:
            return Trace(tuple(seconds), tuple(counts), end)
        if comes <= goes:
            heapq.heappop(returns)
            present += 1
        else:
            heapq.heappush(returns, at + away_seconds)
            present -= 1
        seconds.append(round(at, 1))
        counts.append(present)


def changes(trace: Trace, wanted: int, seed: int = 0) -> Iterator[Change]:
    """What a run that wants so many nodes sees, for ever; the first is what it begins with.

    Args:
        trace: nodes over time.
        wanted: how many the run takes at most.
        seed: of which nodes go, where the trace has more than are wanted.
    """
    draw = np.random.default_rng(seed)
    copies = max(1, math.ceil(wanted / trace.most)) if trace.most else 1
    offsets = [trace.end * copy / copies for copy in range(copies)]
    streams = [_deltas(trace, offset) for offset in offsets]
    there = sum(_count_at(trace, offset) for offset in offsets)
    held = min(wanted, there)
    yield Change(0.0, 0, held)
    merged = heapq.merge(*streams)
    for at, together in itertools.groupby(merged, key=lambda delta: delta[0]):
        steps = [step for _, step in together]
        gone, come = -sum(s for s in steps if s < 0), sum(s for s in steps if s > 0)
        lost = int(draw.hypergeometric(held, there - held, gone)) if gone else 0
        there += come - gone
        before, held = held, min(wanted, there)
        if lost or held != before:
            yield Change(at, lost, held)


def _deltas(trace: Trace, offset: float) -> Iterator[tuple[float, int]]:
    """When the trace, begun at an offset, changes, and by how many nodes."""
    if len(set(trace.nodes)) == 1:
        return
    last = trace.nodes[-1]
    rows = list(zip(trace.seconds, trace.nodes, strict=True))
    for lap in itertools.count():
        for at, count in rows:
            since = lap * trace.end + at - offset
            if since > 0 and count != last:
                yield since, count - last
            last = count


def _count_at(trace: Trace, at: float) -> int:
    return [n for s, n in zip(trace.seconds, trace.nodes, strict=True) if s <= at][-1]


def _from_csv(text: str) -> Trace:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    header, *rows = csv.reader(lines)
    if header != HEADER:
        raise ValueError(f"its first line is {','.join(header)}, not {','.join(HEADER)}")
    return _checked([float(at) for at, _ in rows], [int(count) for _, count in rows])


def _from_json(text: str) -> Trace:
    values = parse_object(text)
    gap, data = float(values["metadata"]["gap_seconds"]), [int(count) for count in values["data"]]
    return _checked([gap * place for place in range(len(data) + 1)], [*data, data[-1]])


def _checked(seconds: list[float], nodes: list[int]) -> Trace:
    if len(seconds) < 2 or seconds[0] != 0:
        raise ValueError("it needs a row at 0 seconds and one at its end")
    if any(a >= b for a, b in itertools.pairwise(seconds)):
        raise ValueError("its seconds don't grow from row to row")
    if not all(map(math.isfinite, seconds)) or seconds[-1] < SHORTEST_SECONDS:
        raise ValueError(f"it must last {SHORTEST_SECONDS:.0f} seconds at least, and end")
    if min(nodes) < 0 or max(nodes) == 0:
        raise ValueError("it never has a node, or fewer than none")
    if max(nodes) > MOST_NODES:
        raise ValueError(f"it has more than {MOST_NODES:,} nodes")
    return Trace(tuple(seconds[:-1]), tuple(nodes[:-1]), seconds[-1])
