"""What goes into which shard: a pure function of the source's units, the size and the seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cat_ray.data.sources import Unit
from cat_ray.training.randomness import Purpose, random_stream

MIXED_IMAGES = 2000


@dataclass(frozen=True)
class Take:
    """Some of a unit's samples: from one place in it to another."""

    unit: Unit
    first: int
    stop: int


@dataclass(frozen=True)
class ShardPlan:
    """What goes into a shard.

    Attributes:
        number: of the shard.
        seed: of the order.
        groups: takes that are read together, and whose samples are mixed where units have several.
    """

    number: int
    seed: int
    groups: tuple[tuple[Take, ...], ...]

    @property
    def name(self) -> str:
        """The shard's file name."""
        return f"train-{self.number:06d}.tar"

    def order(self, group: int) -> list[int]:
        """The order in which a group's samples are written."""
        takes = self.groups[group]
        count = sum(take.stop - take.first for take in takes)
        if all(take.unit.count == 1 for take in takes):
            return list(range(count))
        random = random_stream(self.seed, Purpose.PREPARATION, self.number, group)
        return random.permutation(count).tolist()


def plan_shards(units: Sequence[Unit], shard_images: int, seed: int) -> Iterator[ShardPlan]:
    """Deals all samples to shards of equal size, the last one smaller.

    Units are shuffled. Where each holds one sample that is all there is to do; the samples of
    larger ones, which lie together, are mixed with those of the next, some thousands at a time.
    """
    order = random_stream(seed, Purpose.PREPARATION).permutation(len(units))
    takes: list[Take] = []
    held = number = 0
    for place in order:
        unit, first = units[place], 0
        while first < unit.count:
            stop = min(unit.count, first + shard_images - held)
            takes.append(Take(unit, first, stop))
            first, held = stop, held + stop - first
            if held == shard_images:
                yield ShardPlan(number, seed, tuple(_groups(takes)))
                takes, held, number = [], 0, number + 1
    if takes:
        yield ShardPlan(number, seed, tuple(_groups(takes)))


def _groups(takes: Sequence[Take]) -> Iterator[tuple[Take, ...]]:
    ends = np.cumsum([take.stop - take.first for take in takes])
    number = (ends - 1) // MIXED_IMAGES
    for group in np.unique(number):
        members = np.flatnonzero(number == group)
        yield tuple(takes[members[0] : members[-1] + 1])
