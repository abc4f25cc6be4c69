"""A job on a spot trace, at several sizes, with and without notice: `cat-ray plan --replay`."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.console import RenderableType
from rich.table import Table

from cat_ray.config import Config
from cat_ray.errors import BadInput
from cat_ray.operations.plan import Plan, useful_workers
from cat_ray.operations.plan_report import duration, finite
from cat_ray.operations.recovery import Measured
from cat_ray.operations.replay import Replayed, Terms, replay
from cat_ray.operations.save_size import bytes_to_restore, save_times
from cat_ray.operations.spot_trace import Trace, changes
from cat_ray.operations.work import images_per_gpu_second

SIZES = (8, 64, 512, 4096)
# A simulation is given up after so many times as long as the run would take undisturbed, and not
# before the trace's end.
PATIENCE = 20


@dataclass(frozen=True)
class Case:
    """A size of the run and what became of it, hours and dollars without any loss beside it.

    Attributes:
        gpus: asked for.
        used: that have a lane; no others are paid for.
        nodes: they are on.
        undisturbed_hours: the same run if nobody takes anything.
        with_notice, without_notice: what became of it.
        spot_dollars: of each, with and without notice; None without a price.
        on_demand_dollars: of the undisturbed run.
    """

    gpus: int
    used: int
    nodes: int
    undisturbed_hours: float
    with_notice: Replayed
    without_notice: Replayed
    spot_dollars: tuple[float, float] | None
    on_demand_dollars: float | None


def terms_of(
    config: Config, plan: Plan, nodes: int, measured: Measured, notice_seconds: float
) -> Terms:
    """What the run is like on nodes of `plan.assumptions.workers_per_machine` GPUs.

    Raises:
        BadInput: the plan is for the CPU, of whose speed nothing is known.
    """
    assumed, recovery = plan.assumptions, measured.times
    if assumed.gpu is None:
        raise BadInput("--replay needs to know how fast a worker is: name a GPU type with --gpu")
    rates, size, networks = assumed.rates, plan.checkpoint.bytes, plan.networks
    workers = nodes * assumed.workers_per_machine
    reads = bytes_to_restore(
        config, networks.generator.parameters, networks.discriminator.parameters, workers
    )
    times = save_times(size, reads, workers, nodes, rates)
    return Terms(
        total_images=config.run.total_images,
        batch_size=config.optimisation.batch_size,
        save_every_images=config.checkpoints.save_every_images,
        lanes=config.optimisation.lanes,
        gpus_per_node=assumed.workers_per_machine,
        minimum_nodes=min(nodes, math.ceil(config.workers.minimum / assumed.workers_per_machine)),
        images_per_gpu_second=images_per_gpu_second(
            config, assumed.gpu.peak_teraflops, assumed.utilisation, workers
        ),
        stall_seconds=times.stall if measured.stall_seconds is None else measured.stall_seconds,
        stored_seconds=times.stored * nodes if measured.stored_seconds is None else 0.0,
        save_fixed_seconds=measured.stored_seconds or 0.0,
        killed_seconds=recovery.killed,
        drained_seconds=recovery.drained,
        joined_seconds=recovery.joined,
        # A run's own recoveries have it in them.
        restore_seconds=times.restore if recovery.of_drills else 0.0,
        notice_seconds=notice_seconds,
        margin=config.preemption.margin,
    )


def replay_job(
    config: Config,
    plan: Plan,
    trace: Trace,
    sizes: Sequence[int],
    measured: Measured,
    notice_seconds: float,
    seed: int,
) -> list[Case]:
    """Simulates the job on the trace at each number of GPUs.

    Raises:
        BadInput: as `terms_of`.
    """
    return [_case(config, plan, trace, size, measured, notice_seconds, seed) for size in sizes]


def _case(
    config: Config,
    plan: Plan,
    trace: Trace,
    gpus: int,
    measured: Measured,
    notice_seconds: float,
    seed: int,
) -> Case:
    each = plan.assumptions.workers_per_machine
    used = useful_workers(config, gpus)
    nodes = math.ceil(used / each)
    results = []
    for notice in (notice_seconds, 0.0):
        terms = terms_of(config, plan, nodes, measured, notice)
        seconds = terms.total_images / terms.rate(nodes)
        limit = max(trace.end, PATIENCE * seconds)
        results.append(replay(terms, changes(trace, nodes, seed), limit))
    spot, on_demand = plan.spot.per_hour, plan.on_demand.per_hour
    hours = seconds / 3600

    def dollars(result: Replayed) -> float:
        return result.total_node_seconds / 3600 * each * (spot or 0.0)

    return Case(
        gpus=gpus,
        used=used,
        nodes=nodes,
        undisturbed_hours=hours,
        with_notice=results[0],
        without_notice=results[1],
        spot_dollars=None if spot is None else (dollars(results[0]), dollars(results[1])),
        on_demand_dollars=None if on_demand is None else hours * nodes * each * on_demand,
    )


def replay_tables(
    cases: Sequence[Case], trace: Trace, measured: Measured, plan: Plan
) -> Iterator[RenderableType]:
    """What was found, to read at 100 columns."""
    each = plan.assumptions.workers_per_machine
    title = (
        f"on the trace: {duration(trace.end)} of up to {trace.most} nodes of {each} GPUs, "
        f"{trace.interruptions_per_node_hour:.2f} interruptions per node-hour"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("GPUs", "notice", "goodput", "finished", "without loss", "spot", "on demand"):
        table.add_column(heading, justify="right")
    table.add_column("lost images", justify="right")
    table.add_column("inter-\nruptions", justify="right")
    for case in cases:
        pairs = (("yes", case.with_notice), ("no", case.without_notice))
        for place, (told, result) in enumerate(pairs):
            spot = case.spot_dollars
            size = f"{case.gpus:,}" if case.used == case.gpus else f"{case.gpus:,} ({case.used:,})"
            table.add_row(
                size if place == 0 else "",
                told,
                f"{result.goodput:.1%}",
                duration(result.seconds) if result.finished else _unfinished(result),
                f"{case.undisturbed_hours:,.1f} h" if place == 0 else "",
                "?" if spot is None else f"${spot[place]:,.0f}",
                _told_on_demand(case.on_demand_dollars) if place == 0 else "",
                f"{result.lost_images:,.0f}",
                f"{result.interruptions:,}",
            )
        table.add_section()
    yield table
    yield (
        "estimated: at the plan's rate of images. With notice only the running step is lost, where "
        "the save fits."
    )
    if any(case.used < case.gpus for case in cases):
        yield "In brackets: GPUs that have a lane, optimisation.lanes at most; no others are used."
    times = measured.times
    yield (
        f"from a change to the first new step: {times.killed:.1f} s without notice, "
        f"{times.drained:.1f} s with, {times.joined:.1f} s for nodes that join, and reading and "
        f"writing the checkpoint ({times.source})"
    )


def cases_to_json(cases: Sequence[Case], trace: Trace, measured: Measured) -> str:
    """The same for a program: node-seconds, images, dollars; goodput from 0 to 1."""
    values = {
        "trace": {
            "seconds": trace.end,
            "most_nodes": trace.most,
            "interruptions_per_node_hour": trace.interruptions_per_node_hour,
        },
        "times": asdict(measured),
        "cases": [
            {
                **asdict(case),
                "goodput_with_notice": case.with_notice.goodput,
                "goodput_without_notice": case.without_notice.goodput,
            }
            for case in cases
        ],
    }
    return json.dumps(finite(values), indent=2)


def _unfinished(result: Replayed) -> str:
    return f"not in {duration(result.seconds)}"


def _told_on_demand(dollars: float | None) -> str:
    return "?" if dollars is None else f"${dollars:,.0f}"
