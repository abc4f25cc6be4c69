"""`cat-ray bench recovery`: how long a run stands still when nodes go and come, and a fresh start.

Each repetition is a drill: a run on a cluster of one node for each worker, made on this machine,
that loses its last worker's node without notice, gets a new one, and has one drained.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from cat_ray.config import Config
from cat_ray.errors import BadInput, RunFailed
from cat_ray.operations.drill import drilled, recoveries, train_with_faults
from cat_ray.operations.goodput import Row, read_ledger
from cat_ray.training.faults import Fault, Kind

FRESH = "fresh start"
NAMES: dict[Kind, str] = {
    "remove": "a node is killed without notice",
    "add": "a node joins",
    "drain": "a node drains",
}
# In steps. Ray Train looks for new nodes every few seconds: there is time to find the one that
# came before another goes.
BETWEEN_SAVES, REMOVED_AT, ADDED_AT, DRAINED_AT, STEPS = 10, 20, 40, 100, 150


@dataclass(frozen=True)
class RecoverySeconds:
    """Seconds to the end of the first new step, of each repetition, by what happened.

    A fresh start counts from the call of the training, on a cluster that runs; the others from
    the fault, or the node's arrival.
    """

    seconds: Mapping[str, Sequence[float]]

    def median(self, what: str) -> float:
        """In seconds."""
        return statistics.median(self.seconds[what])

    def ratio(self, what: str) -> float:
        """Its median as a share of a fresh start's."""
        return self.median(what) / self.median(FRESH)


def schedule(config: Config) -> tuple[Config, tuple[Fault, ...]]:
    """The job, made long enough, and its faults.

    Raises:
        BadInput: it has a single lane: no second worker could come or go.
    """
    if config.optimisation.lanes < 2:
        raise BadInput("bench recovery needs two workers: set optimisation.lanes to 2 or more")
    batch, workers = config.optimisation.batch_size, max(2, config.workers.maximum)
    last = workers - 1
    faults = (
        Fault("remove", REMOVED_AT * batch, last),
        Fault("add", ADDED_AT * batch),
        Fault("drain", DRAINED_AT * batch, last),
    )
    changed = {
        "run": config.run.model_copy(update={"total_images": STEPS * batch}),
        "checkpoints": config.checkpoints.model_copy(
            update={"save_every_images": BETWEEN_SAVES * batch}
        ),
        "workers": config.workers.model_copy(update={"minimum": 1, "maximum": workers}),
    }
    return drilled(config.model_copy(update=changed), "recovery", len(faults)), faults


def bench_recovery(config: Config, repetitions: int) -> RecoverySeconds:
    """Drills a job again and again, in a folder beside its own that is removed afterwards.

    Raises:
        BadInput: the job can't be used, or the folder isn't empty.
        RunFailed: a run didn't survive its faults, or went on without noticing one.
    """
    config, faults = schedule(config)
    run = config.storage.locate(config.run.folder)
    if not run.is_empty():
        raise BadInput(f"{run.uri} isn't empty: a drill begins a run of its own")
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(repetitions):
        began, failure = train_with_faults(config, faults)
        if failure:
            raise RunFailed(f"{failure}; its folder is {run.uri}")
        seconds[FRESH].append(fresh_start(read_ledger(run), began))
        for recovery in recoveries(run, faults):
            if recovery.seconds is None:
                told = f"{recovery.fault.kind} at {recovery.fault.images:,} images"
                raise RunFailed(f"the run ended before its group did, after {told}: {run.uri}")
            seconds[NAMES[recovery.fault.kind]].append(recovery.seconds)
        run.delete_folder()
    return RecoverySeconds(dict(seconds))


def fresh_start(rows: Sequence[Row], began: float) -> float:
    """Seconds from the call of the training to the end of the run's first step."""
    return min(row.at for row in rows if row.images > 0) - began


def recovery_table(found: RecoverySeconds) -> Table:
    """The figures, for a person: medians with the range."""
    table = Table("first new step after", "runs", "median", "least", "most", "of a fresh start")
    for what, seconds in found.seconds.items():
        ordered = [statistics.median(seconds), min(seconds), max(seconds)]
        cells = [f"{value:.1f} s" for value in ordered]
        ratio = "" if what == FRESH else f"{found.ratio(what):.2f}"
        table.add_row(what, str(len(seconds)), *cells, ratio)
    return table


def to_json(found: RecoverySeconds) -> str:
    """The same for scripts."""
    medians = {what: found.median(what) for what in found.seconds}
    ratios = {what: found.ratio(what) for what in found.seconds if what != FRESH}
    return json.dumps(
        {"seconds": dict(found.seconds), "medians": medians, "ratios": ratios}, indent=1
    )
