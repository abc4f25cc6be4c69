"""`cat-ray bench waits`: how long workers that step at a given pace wait for their data."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import ray
from rich.table import Table

from cat_ray.config import Config
from cat_ray.connection import connected
from cat_ray.data.stream import Due, RankStream, from_the_start, open_shards
from cat_ray.errors import BadInput
from cat_ray.training.lanes import share


@dataclass(frozen=True)
class Waits:
    """What one worker waited for its data.

    Attributes:
        first_seconds: for the first batch.
        start_seconds: in the first half of its steps, while it begins to read ahead.
        share: of the time of the second half.
    """

    first_seconds: float
    start_seconds: float
    share: float


def bench_waits(
    config: Config, workers: int, step_seconds: float, steps: int, cpus: int
) -> list[Waits]:
    """What each of some workers waits, who do nothing in a step but sleep.

    Args:
        config: the job, for its shards, batch and lanes.
        workers: how many, all on one machine unless Ray runs already.
        step_seconds: how long a step takes them.
        steps: how many each makes.
        cpus: that a Ray which is started here has for reading.

    Raises:
        BadInput: the shards can't be read, don't fit the model, or lanes are fewer than workers.
    """
    lanes = config.optimisation.lanes
    if workers > lanes:
        raise BadInput(f"{workers} workers, but optimisation.lanes is {lanes}: use at most as many")
    index, reading = open_shards(config)
    due = from_the_start(config, index, reading, steps * config.optimisation.batch_size)
    with connected(0, {}, exactly=cpus):
        begun = [
            _waits.remote(due, share(lanes, workers, rank), step_seconds, steps)
            for rank in range(workers)
        ]
        return ray.get(begun)


@ray.remote(num_cpus=0)
def _waits(due: Due, lanes: range, step_seconds: float, steps: int) -> Waits:
    batches = RankStream(due, lanes).batches()
    waited: list[float] = []
    for _ in range(steps):
        asked = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - asked)
        time.sleep(step_seconds)
    start, settled = waited[1 : steps // 2], waited[steps // 2 :]
    return Waits(waited[0], sum(start), sum(settled) / (sum(settled) + len(settled) * step_seconds))


def waits_table(waits: Sequence[Waits], step_seconds: float) -> Table:
    """A line for each worker."""
    table = Table(title=f"waiting for data, steps of {1000 * step_seconds:g} ms")
    for head in ("worker", "first batch", "while starting", "settled"):
        table.add_column(head, justify="right")
    for rank, wait in enumerate(waits):
        table.add_row(
            str(rank),
            f"{wait.first_seconds:.1f} s",
            f"{wait.start_seconds:.1f} s",
            f"{wait.share:.2%}",
        )
    return table


def to_json(waits: Sequence[Waits]) -> str:
    """The same for scripts, by rank."""
    return json.dumps([asdict(wait) for wait in waits], indent=1)
