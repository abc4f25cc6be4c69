"""`cat-ray drill`: a run with faults at given numbers of images, and what became of it."""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from cat_ray.checkpoint.read import newest_sound, read_state, verify
from cat_ray.config import Config, Workers
from cat_ray.data.index import read_index
from cat_ray.data.stream import CPUS_PER_READ
from cat_ray.errors import BadInput, RunFailed
from cat_ray.operations.comparison import compare, compare_input, starts_of
from cat_ray.operations.goodput import Row, read_ledger
from cat_ray.operations.sample_keys import repeated, trained_on
from cat_ray.storage import Location
from cat_ray.training.driver import train
from cat_ray.training.elasticity import drain_node
from cat_ray.training.faults import BY_WORKER, Fault, strike_of

POLL_SECONDS = 0.1
DRAIN_SECONDS = 60.0
GOES_ON = ("refuse",)
STEPS_BETWEEN_SAVES = 8
# A drill doesn't wait long for a stalled step to be found out.
STALL_SECONDS = 30.0


@dataclass(frozen=True)
class Recovery:
    """What a fault cost.

    Attributes:
        fault: the fault.
        at: unix time, None if it never came.
        seconds: from the fault to the next worker group's first step; None where the group went on.
        lost_images: images that were trained on again.
    """

    fault: Fault
    at: float | None
    seconds: float | None
    lost_images: int


@dataclass(frozen=True)
class Drilled:
    """What a drill found: each fault's recovery, and each promise with whether it was kept."""

    recoveries: tuple[Recovery, ...]
    promises: tuple[tuple[str, bool, str], ...]

    @property
    def passed(self) -> bool:
        """Whether every fault came and every promise was kept."""
        came = all(recovery.at is not None for recovery in self.recoveries)
        return came and all(kept for _, kept, _ in self.promises)


def default_schedule(config: Config) -> tuple[Config, tuple[Fault, ...]]:
    """One fault of each kind that a worker can do to itself, two saves apart, and a job to fit."""
    batch = config.optimisation.batch_size
    save_every = STEPS_BETWEEN_SAVES * batch
    apart = 2 * save_every + batch
    last = config.workers.minimum - 1
    faults = tuple(
        Fault(kind, apart * (place + 1), 0 if kind in ("refuse", "truncate") else last)
        for place, kind in enumerate(BY_WORKER)
    )
    checkpoints = config.checkpoints.model_copy(update={"save_every_images": save_every})
    run = config.run.model_copy(update={"total_images": apart * (len(faults) + 1)})
    return config.model_copy(update={"checkpoints": checkpoints, "run": run}), faults


def drill(config: Config, faults: Sequence[Fault]) -> Drilled:
    """Trains the job from its beginning, with the faults and without, and compares.

    For faults of nodes a cluster of one node for each worker is made on this machine. Both runs
    lie in a folder beside the job's own.

    Raises:
        BadInput: the job can't be used, or the folder isn't empty.
    """
    faulty, undisturbed = (drilled(config, name, len(faults)) for name in ("faults", "undisturbed"))
    run = config.storage.locate(faulty.run.folder)
    if not run.is_empty():
        raise BadInput(f"{run.uri} isn't empty: a drill begins a run of its own")
    console = Console()
    console.rule("with faults on purpose: Ray reports workers and nodes that died")
    _, failure = train_with_faults(faulty, faults)
    promises = _findings(faulty, run, failure)
    if all(kept for _, kept, _ in promises):
        console.rule("undisturbed")
        train(undisturbed)
        other = config.storage.locate(undisturbed.run.folder)
        # Groups of other sizes round otherwise, and a GAN makes much of it in a hundred steps: with
        # faults of nodes only what went in can be compared. verify-resume compares its first steps.
        compared = (
            compare_input("", other, run) if of_nodes(faults) else compare("", other, run, None)
        )
        promises += [(f"same: {row.what}", row.same, row.measured) for row in compared]
    return Drilled(recoveries(run, faults), tuple(promises))


def drilled(config: Config, name: str, faults: int) -> Config:
    """The job as a drill with so many faults trains it, in a folder beside its own."""
    workers = config.workers
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"folder": f"{config.run.folder}-drill/{name}"}),
            "reporting": config.reporting.model_copy(
                update={"sample_keys": True, "grid_every_images": config.run.total_images}
            ),
            "evaluation": config.evaluation.model_copy(update={"protocol": "none"}),
            "workers": workers.model_copy(
                update={
                    # How many failures are survived is no question of a drill: it makes them all.
                    "max_failures": max(workers.max_failures, faults),
                    "stall_seconds": min(workers.stall_seconds, STALL_SECONDS),
                }
            ),
        }
    )


def of_nodes(faults: Sequence[Fault]) -> bool:
    """Whether some are done to nodes, not by workers to themselves."""
    return any(fault.kind not in BY_WORKER for fault in faults)


def train_with_faults(config: Config, faults: Sequence[Fault]) -> tuple[float, str]:
    """Trains a job with faults, for faults of nodes on a cluster made for it on this machine.

    Returns:
        The unix time at which training was called, and why it failed, if it did.
    """
    with ExitStack() as around:
        if of_nodes(faults):
            workers, cpus = _alone_on_a_node(config.workers)
            config = config.model_copy(update={"workers": workers})
            run = config.storage.locate(config.run.folder)
            nodes = around.enter_context(_nodes(workers.maximum, cpus))
            around.enter_context(_node_faults(run, faults, nodes, cpus))
        began, failure = time.time(), ""
        try:
            train(config, faults)
        except RunFailed as error:
            failure = str(error)
    return began, failure


def recoveries(run: Location, faults: Sequence[Fault]) -> tuple[Recovery, ...]:
    """What each fault of a run cost it."""
    rows = read_ledger(run)
    return tuple(_recovery(run, rows, place, fault) for place, fault in enumerate(faults))


def drill_tables(found: Drilled) -> Iterator[Table]:
    """What was found, for a person."""
    table = Table("fault", "at images", "first new step after", "images done again")
    for recovery in found.recoveries:
        seconds = "went on" if recovery.seconds is None else f"{recovery.seconds:.1f} s"
        came = recovery.at is not None
        table.add_row(
            f"{recovery.fault.kind} of rank {recovery.fault.rank}",
            f"{recovery.fault.images:,}",
            seconds if came else "[red]never came[/red]",
            f"{recovery.lost_images:,}" if came else "",
        )
    yield table
    table = Table("promise", "", "measured")
    for promise, kept, measured in found.promises:
        table.add_row(promise, "[green]pass[/green]" if kept else "[red]FAIL[/red]", measured)
    yield table


def _findings(config: Config, run: Location, failure: str) -> list[tuple[str, bool, str]]:
    rows = read_ledger(run)
    checkpoint = newest_sound(run)
    images = read_state(checkpoint).images if checkpoint else 0
    total = config.run.total_images
    index = read_index(config.storage.locate(config.data.shards))
    try:
        trained = trained_on(run, starts_of(rows))
        twice = repeated(trained, index.images)
        once = not twice and len(trained.keys) == total
        told = f"{len(trained.keys):,} of {total:,} images, {len(twice)} of them twice"
    except ValueError as error:
        once, told = False, str(error)
    damaged = verify(checkpoint) if checkpoint else ["no checkpoint"]
    return [
        ("the run reached its end", not failure and images == total, failure or f"{images:,}"),
        ("each image came exactly once", once, told),
        (
            "the last checkpoint is whole, every hash right",
            not damaged,
            "; ".join(damaged) or (checkpoint.name if checkpoint else ""),
        ),
    ]


def _recovery(run: Location, rows: Sequence[Row], place: int, fault: Fault) -> Recovery:
    strike = strike_of(run, place)
    if strike is None:
        return Recovery(fault, None, None, 0)
    at = strike["at"]
    later = [row for row in rows if row.began > at]
    if fault.kind in GOES_ON or not later:
        return Recovery(fault, at, None, 0)
    starts = {group: images for group, images in starts_of(later)}
    stepped = [row for row in later if row.images > starts[row.group]]
    if not stepped:
        return Recovery(fault, at, None, 0)
    first = min(stepped, key=lambda row: row.at)
    return Recovery(fault, at, first.at - at, max(0, strike["images"] - starts[first.group]))


@contextmanager
def _node_faults(
    run: Location, faults: Sequence[Fault], cluster: Cluster, cpus: int
) -> Iterator[None]:
    """Does to nodes, from a thread, what the workers on them announce."""
    waiting = {p: fault for p, fault in enumerate(faults) if fault.kind not in BY_WORKER}
    left = threading.Event()

    def watch() -> None:
        while not left.wait(POLL_SECONDS):
            for place, fault in list(waiting.items()):
                strike = strike_of(run, place)
                if strike is not None:
                    del waiting[place]
                    _befall(fault, strike["node"], cluster, cpus)

    thread = threading.Thread(target=watch, name="node-faults", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def _befall(fault: Fault, node_id: str, cluster: Cluster, cpus: int) -> None:
    if fault.kind == "drain":
        drain_node(node_id, "a drill", time.time() + DRAIN_SECONDS)
    elif fault.kind == "add":
        cluster.add_node(num_cpus=cpus)
    else:
        node = next(node for node in cluster.worker_nodes if node.node_id == node_id)
        cluster.remove_node(node, allow_graceful=False)


@contextmanager
def _nodes(workers: int, cpus: int) -> Iterator[Cluster]:
    """A cluster here: a head that trains nothing, and a node for each worker."""
    # A node that is added from a thread can't set the handlers that would end it at exit.
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    for _ in range(workers):
        cluster.add_node(num_cpus=cpus)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def _alone_on_a_node(workers: Workers) -> tuple[Workers, int]:
    """The same workers, each taking a node of so many CPUs but for what reading needs."""
    # With two CPUs or more, what is left of a node is too little for a second worker.
    cpus = max(2, math.ceil(workers.cpus_per_worker + CPUS_PER_READ))
    return workers.model_copy(update={"cpus_per_worker": cpus - CPUS_PER_READ}), cpus
