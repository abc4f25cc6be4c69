"""What becomes of a run whose nodes go and come: a simulation, a pure function of the changes.

A run trains while it has enough nodes, stands still for a moment at every save, and starts again
after every change: without notice from its last complete checkpoint, with notice, or to let nodes
join, from a save made at the end of the running step. Every node-second lands in one bin.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from cat_ray.operations.spot_trace import Change

Bin = Literal["train", "save_stall", "start", "lost", "idle"]
BINS: tuple[Bin, ...] = get_args(Bin)
# Positions are sums of many small differences.
CLOSE = 1e-6


@dataclass(frozen=True)
class Terms:
    """What a simulated run is like.

    Attributes:
        total_images: its length.
        batch_size: images of a step.
        save_every_images: it saves at each multiple.
        lanes: what its workers share out.
        gpus_per_node: a worker on each.
        minimum_nodes: with fewer it waits.
        images_per_gpu_second: what one worker trains on.
        stall_seconds: training stands still for a save.
        stored_seconds: until a save by one node is complete; n nodes take an n-th of it.
        save_fixed_seconds: what a save takes whatever the nodes.
        killed_seconds: from a loss without notice to training.
        drained_seconds: from giving way with notice to training, the save aside.
        joined_seconds: likewise for nodes that come.
        restore_seconds: on top of each of these, to read the checkpoint.
        notice_seconds: before a node goes; 0 is none.
        margin: a save must take at most 1 / margin of that.
    """

    total_images: int
    batch_size: int
    save_every_images: int
    lanes: int
    gpus_per_node: int
    minimum_nodes: int
    images_per_gpu_second: float
    stall_seconds: float
    stored_seconds: float
    save_fixed_seconds: float
    killed_seconds: float
    drained_seconds: float
    joined_seconds: float
    restore_seconds: float
    notice_seconds: float
    margin: float = 1.5

    def rate(self, nodes: int) -> float:
        """Images per second: the worker with the most lanes is waited for by the others."""
        workers = min(nodes * self.gpus_per_node, self.lanes)
        if not workers:
            return 0.0
        busiest = math.ceil(self.lanes / workers)
        return self.images_per_gpu_second * self.lanes / busiest

    def save_seconds(self, nodes: int) -> float:
        """Until a save by so many nodes is complete on the storage."""
        return self.save_fixed_seconds + self.stored_seconds / max(1, nodes)

    def leaving_seconds(self, before: int, lost: int) -> float | None:
        """How long giving way holds training up for its save, or None where no save fits.

        As `training/preemption.py` chooses: all upload their parts, or, where that takes longer
        than the nodes that go have, those that stay upload theirs as well.
        """
        if not self.notice_seconds:
            return None
        seconds = self.save_seconds(before)
        if seconds * self.margin <= self.notice_seconds:
            return seconds
        return self.save_seconds(before - lost) if lost < before else None


@dataclass(frozen=True)
class Replayed:
    """What became of a run.

    Attributes:
        finished: whether it reached its end within the time allowed.
        seconds: from its beginning to its end, or to where the simulation was given up.
        images: kept.
        lost_images: trained on again.
        interruptions: times that nodes went which the run had.
        joins: times that it started again for nodes that came.
        node_seconds: of every bin.
    """

    finished: bool
    seconds: float
    images: float
    lost_images: float
    interruptions: int
    joins: int
    node_seconds: dict[Bin, float]

    @property
    def total_node_seconds(self) -> float:
        """All that was paid for."""
        return sum(self.node_seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time that was training, and kept."""
        total = self.total_node_seconds
        return self.node_seconds["train"] / total if total else 0.0


def replay(terms: Terms, changes: Iterable[Change], limit_seconds: float) -> Replayed:
    """Simulates a run until it is finished, or for so many seconds.

    Args:
        terms: what the run is like.
        changes: of its nodes, in order of time, the first one at 0.
        limit_seconds: when to give up.
    """
    run = _Run(terms)
    for change in changes:
        run.advance(min(change.at, limit_seconds))
        if run.finished or change.at >= limit_seconds:
            break
        run.meet(change)
    else:
        run.advance(limit_seconds)
    return run.result()


@dataclass(frozen=True)
class _Mark:
    """A save: where it was made, when it is complete, and the training that led to it."""

    images: float
    complete_at: float
    trained: float


@dataclass
class _Run:
    """The state of a simulated run; `busy_until` is when it trains again."""

    terms: Terms
    at: float = 0.0
    nodes: int = 0
    images: float = 0.0
    busy_until: float = math.inf
    busy_with: Bin = "idle"
    finished: bool = False
    interruptions: int = 0
    joins: int = 0
    lost_images: float = 0.0
    marks: list[_Mark] = field(default_factory=lambda: [_Mark(0.0, 0.0, 0.0)])
    spent: dict[Bin, float] = field(default_factory=lambda: dict.fromkeys(BINS, 0.0))

    def advance(self, until: float) -> None:
        """Lets time pass without any change."""
        while self.at < until and not self.finished:
            if self.at < self.busy_until:
                self._spend(self.busy_with, min(until, self.busy_until))
            else:
                self._train(until)

    def meet(self, change: Change) -> None:
        """Nodes go or come, now."""
        before, self.nodes = self.nodes, change.nodes
        training = self.at >= self.busy_until or self.busy_with == "save_stall"
        enough = change.nodes >= max(1, self.terms.minimum_nodes)
        pause = self.terms.restore_seconds if self.images else 0.0
        if change.lost:
            self.interruptions += 1
            saving = self.terms.leaving_seconds(before, change.lost)
            if not training:
                pause += self.terms.killed_seconds if saving is None else self.terms.drained_seconds
            elif saving is None:
                self._fall_back()
                pause = self.terms.killed_seconds + self._restore()
            else:
                self._save_step()
                pause = self.terms.drained_seconds + saving + self._restore()
        elif training and change.nodes > before:
            self.joins += 1
            self._save_step()
            saving = self.terms.save_seconds(before)
            pause = self.terms.joined_seconds + saving + self._restore()
        elif self.busy_with == "idle" and self.busy_until == math.inf:
            pause += self.terms.killed_seconds
        else:
            # Those who are starting take in whoever comes meanwhile.
            return
        # A start that is under way doesn't get earlier by being interrupted.
        under_way = self.busy_until if self.busy_with == "start" and not training else 0.0
        self.busy_with = "start" if enough else "idle"
        self.busy_until = max(under_way, self.at + pause) if enough else math.inf

    def result(self) -> Replayed:
        """What became of it: what isn't saved counts as kept only at the end of the run."""
        return Replayed(
            finished=self.finished,
            seconds=self.at,
            images=self.images,
            lost_images=self.lost_images,
            interruptions=self.interruptions,
            joins=self.joins,
            node_seconds=dict(self.spent),
        )

    def _train(self, until: float) -> None:
        terms, rate = self.terms, self.terms.rate(self.nodes)
        steps = math.floor(self.images / terms.save_every_images + CLOSE) + 1
        target = min(terms.total_images, steps * terms.save_every_images)
        arrives = self.at + (target - self.images) / rate
        if arrives > until:
            self.images += rate * (until - self.at)
            self._spend("train", until)
            return
        self._spend("train", arrives)
        self.images = float(target)
        self.finished = target == terms.total_images
        # Saves are uploaded one after the other.
        begins = max(self.at, self.marks[-1].complete_at)
        complete_at = begins + terms.save_seconds(self.nodes)
        self.marks.append(_Mark(self.images, complete_at, self.spent["train"]))
        if not self.finished:
            self.busy_with, self.busy_until = "save_stall", self.at + terms.stall_seconds

    def _spend(self, name: Bin, until: float) -> None:
        self.spent[name] += self.nodes * (until - self.at)
        self.at = until

    def _fall_back(self) -> None:
        """To the last save that is complete."""
        complete = [mark for mark in self.marks if mark.complete_at <= self.at]
        self._lose_since(complete[-1])

    def _save_step(self) -> None:
        """Loses what there is of the running step, and saves."""
        whole = math.floor(self.images / self.terms.batch_size + CLOSE) * self.terms.batch_size
        newest = self.marks[-1]
        done = self.images - newest.images
        kept = (whole - newest.images) / done if done > CLOSE else 1.0
        trained = newest.trained + max(0.0, kept) * (self.spent["train"] - newest.trained)
        self._lose_since(_Mark(max(float(whole), newest.images), self.at, trained))

    def _lose_since(self, mark: _Mark) -> None:
        self.lost_images += self.images - mark.images
        self.spent["lost"] += self.spent["train"] - mark.trained
        self.spent["train"] = mark.trained
        self.images, self.marks = mark.images, [mark]

    def _restore(self) -> float:
        return self.terms.restore_seconds if self.images else 0.0
