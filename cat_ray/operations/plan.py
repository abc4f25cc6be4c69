"""`cat-ray plan`: what a job will need and cost, before anything is started."""

import math
from dataclasses import dataclass

import torch

from cat_ray.config import Config, Offload
from cat_ray.operations.activations import Networks, count_networks, rows_of
from cat_ray.operations.data_need import DataNeed, data_need
from cat_ray.operations.gpus import Gpu
from cat_ray.operations.memory import (
    USABLE_SHARE,
    WorkerMemory,
    before_sharding,
    worker_memory,
)
from cat_ray.operations.save_size import (
    Rates,
    SaveTimes,
    best_interval_seconds,
    bytes_to_restore,
    checkpoint_bytes,
    save_times,
    slice_count,
)
from cat_ray.operations.work import Work, images_per_gpu_second, work_of

ZERO_STAGES = (0, 1, 2, 3)
OFFLOADED: tuple[tuple[int, Offload], ...] = ((1, "optimiser"), (3, "all"))
NOTICE_SECONDS = {"AWS": 120.0, "GCP and Azure": 30.0}
IDLE_LANES_TOLD = 0.02


@dataclass(frozen=True)
class Assumptions:
    """What a plan is made for.

    Attributes:
        gpu: the type; None is processes on the CPU.
        workers: GPUs, or processes on the CPU.
        workers_per_machine: of these.
        utilisation: share of the peak that is reached, 0 to 1.
        interruptions_per_hour: of the whole run.
        rates: of copying, writing and uploading.
    """

    gpu: Gpu | None
    workers: int
    workers_per_machine: int
    utilisation: float
    interruptions_per_hour: float
    rates: Rates

    @property
    def machines(self) -> int:
        """Nodes that the workers are on."""
        return -(-self.workers // self.workers_per_machine)


@dataclass(frozen=True)
class Setting:
    """A way to hold a job in memory, and what that takes.

    `memory` is of one worker; `zero_stages` and `offloads` are the generator's and the
    discriminator's.
    """

    zero_stages: tuple[int, int]
    checkpointing: bool
    memory: WorkerMemory
    offloads: tuple[Offload, Offload] = ("none", "none")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: bytes, seconds, and the interval that loses least, in seconds and images.

    `job_seconds` is the job's own interval. Intervals are None where no rate of images is known.
    """

    bytes: int
    times: SaveTimes
    young_daly_seconds: float
    best_seconds: float
    best_images: int | None
    job_images: int
    job_seconds: float | None


@dataclass(frozen=True)
class Price:
    """A run's price at so many dollars per worker and hour, without any loss; None is unknown."""

    per_hour: float | None
    source: str
    total: float | None


@dataclass(frozen=True)
class Plan:
    """All that `cat-ray plan` tells.

    Attributes:
        assumptions: what it is for.
        networks: both networks, counted.
        before_sharding: bytes of weights, gradients and moments of G and of D.
        averages: bytes of the generator's averages.
        job: the job's own setting.
        settings: every ZeRO stage with and without activation checkpointing, and on a GPU with
            the optimiser, or all, offloaded.
        work: operations for each image.
        images_per_second: of all workers; None on the CPU, where nothing is known of its speed.
        hours: of the whole run.
        data: what the storage must give.
        checkpoint: its size and times.
        spot, on_demand: the price.
        problems: what does not fit, each with what to change.
    """

    assumptions: Assumptions
    networks: Networks
    before_sharding: tuple[int, int]
    averages: int
    job: Setting
    settings: tuple[Setting, ...]
    work: Work
    images_per_second: float | None
    hours: float | None
    data: DataNeed
    checkpoint: Checkpoint
    spot: Price
    on_demand: Price
    problems: tuple[str, ...]


def useful_workers(config: Config, workers: int) -> int:
    """How many of the workers have a lane."""
    return min(workers, config.optimisation.lanes)


def make_plan(config: Config, assumptions: Assumptions) -> Plan:
    """Plans a job."""
    gpu, optimisation = assumptions.gpu, config.optimisation
    workers = useful_workers(config, assumptions.workers)
    bf16 = optimisation.precision == "bf16" or (optimisation.precision == "auto" and gpu)
    dtype = torch.bfloat16 if bf16 else None
    networks = count_networks(config, rows_of(config, workers), dtype)

    def setting(
        stages: tuple[int, int], checkpointing: bool, offloads: tuple[Offload, Offload]
    ) -> Setting:
        on_gpu = gpu is not None
        memory = worker_memory(config, networks, workers, stages, checkpointing, on_gpu, offloads)
        return Setting(stages, checkpointing, memory, offloads)

    engines = optimisation.generator, optimisation.discriminator
    job = setting(
        (engines[0].zero_stage, engines[1].zero_stage),
        optimisation.activation_checkpointing,
        (engines[0].offload, engines[1].offload),
    )
    ways: list[tuple[int, Offload]] = [(stage, "none") for stage in ZERO_STAGES]
    if gpu is not None:
        ways += OFFLOADED
    settings = tuple(
        setting((stage, stage), checkpointing, (offload, offload))
        for stage, offload in ways
        for checkpointing in (False, True)
    )
    rate = hours = None
    if gpu is not None:
        lanes = optimisation.lanes
        busiest = math.ceil(lanes / workers)
        one = images_per_gpu_second(config, gpu.peak_teraflops, assumptions.utilisation, workers)
        rate = one * lanes / busiest
        hours = config.run.total_images / rate / 3600
    prices = {
        kind: _price(
            getattr(config.cost, f"{kind}_per_gpu_hour"),
            getattr(gpu, f"{kind}_per_gpu_hour", None),
            gpu,
            None if hours is None else hours * assumptions.workers,
        )
        for kind in ("spot", "on_demand")
    }
    checkpoint = _checkpoint(config, networks, assumptions, rate)
    return Plan(
        assumptions=assumptions,
        networks=networks,
        before_sharding=(
            before_sharding(networks.generator.parameters),
            before_sharding(networks.discriminator.parameters),
        ),
        averages=4 * networks.generator.parameters * len(optimisation.ema_decays),
        job=job,
        settings=settings,
        work=work_of(config, workers),
        images_per_second=rate,
        hours=hours,
        data=data_need(config, rate),
        checkpoint=checkpoint,
        spot=prices["spot"],
        on_demand=prices["on_demand"],
        problems=tuple(_problems(config, assumptions, job, settings, checkpoint)),
    )


def usable_bytes(gpu: Gpu) -> float:
    """What a worker can take of a GPU's memory."""
    return gpu.memory_gigabytes * 1e9 * USABLE_SHARE


def _price(own: float | None, listed: float | None, gpu: Gpu | None, hours: float | None) -> Price:
    if own is not None:
        per_hour, source = own, "the job's cost section"
    elif gpu is not None and listed is not None:
        per_hour, source = listed, f"indicative list price, {gpu.source}, {gpu.date}"
    else:
        per_hour, source = None, "no price known: set it in the job's cost section"
    known = per_hour is not None and hours is not None
    return Price(per_hour, source, per_hour * hours if known else None)


def _checkpoint(
    config: Config, networks: Networks, assumptions: Assumptions, rate: float | None
) -> Checkpoint:
    g, d = networks.generator, networks.discriminator
    slices = slice_count(config, g.tensors, d.tensors, assumptions.workers)
    bytes = checkpoint_bytes(config, g.parameters, d.parameters, slices)
    times = save_times(
        bytes,
        bytes_to_restore(config, g.parameters, d.parameters, assumptions.workers),
        assumptions.workers,
        assumptions.machines,
        assumptions.rates,
    )
    young_daly = best_interval_seconds(times.stall, assumptions.interruptions_per_hour)
    # A save can't begin before the one before it is stored.
    best = max(young_daly, times.stored)
    batch, own = config.optimisation.batch_size, config.checkpoints.save_every_images
    return Checkpoint(
        bytes=bytes,
        times=times,
        young_daly_seconds=young_daly,
        best_seconds=best,
        best_images=None
        if rate is None or math.isinf(best)
        else max(batch, math.ceil(best * rate / batch) * batch),
        job_images=own,
        job_seconds=None if rate is None else own / rate,
    )


def _problems(
    config: Config,
    assumptions: Assumptions,
    job: Setting,
    settings: tuple[Setting, ...],
    checkpoint: Checkpoint,
) -> list[str]:
    optimisation, workers, gpu = config.optimisation, assumptions.workers, assumptions.gpu
    problems = []
    if gpu is not None and job.memory.total > usable_bytes(gpu):
        need, have = job.memory.total / 1e9, usable_bytes(gpu) / 1e9
        problems.append(
            f"{need:.0f} GB are more than the {have:.0f} GB that a worker can use of a "
            f"{gpu.name}: {_remedy(job, settings, usable_bytes(gpu))}"
        )
    if workers > optimisation.lanes:
        problems.append(
            f"{workers} workers are more than optimisation.lanes {optimisation.lanes}: the others "
            f"have nothing to do. More lanes need optimisation.batch_size (now "
            f"{optimisation.batch_size}) to be a multiple of them"
        )
    elif (idle := _idle_share(optimisation.lanes, workers)) > IDLE_LANES_TOLD:
        problems.append(
            f"{optimisation.lanes} lanes on {workers} workers leave {idle:.0%} of their time idle: "
            "choose workers that divide optimisation.lanes"
        )
    if config.workers.maximum < workers:
        problems.append(
            f"workers.maximum is {config.workers.maximum}: set it to {workers} to use as many"
        )
    stored, margin = checkpoint.times.stored, config.preemption.margin
    short = [cloud for cloud, notice in NOTICE_SECONDS.items() if stored * margin > notice]
    if gpu is not None and short:
        problems.append(
            f"a save takes {stored:.0f} s on {assumptions.machines} machine"
            f"{'s' * (assumptions.machines > 1)}, too long for the notice of "
            f"{' and of '.join(short)}: machines that stay save for those that go, and if all go "
            "at once the work since the last save is lost. Use more machines, or faster storage"
        )
    if checkpoint.job_seconds is not None and checkpoint.job_seconds < stored:
        problems.append(
            f"checkpoints.save_every_images {checkpoint.job_images:,} is every "
            f"{checkpoint.job_seconds:.0f} s, but a save takes {stored:.0f} s: saves would pile "
            f"up. Set it to {checkpoint.best_images:,}"
        )
    return problems


def _idle_share(lanes: int, workers: int) -> float:
    return 1 - lanes / (math.ceil(lanes / workers) * workers)


def _remedy(job: Setting, settings: tuple[Setting, ...], usable: float) -> str:
    """The setting nearest to the job's that fits; checkpointing, which costs time, if needed."""
    fitting = [each for each in settings if each.memory.total <= usable]
    held = [each for each in fitting if each.offloads[0] == "none"]
    free = [each for each in held if not each.checkpointing]
    if free:
        stage = free[0].zero_stages[0]
        return f"set optimisation.generator.zero_stage and .discriminator.zero_stage to {stage}"
    same = [each for each in held if each.zero_stages[0] == max(job.zero_stages)]
    if same and not job.checkpointing:
        total = same[0].memory.total / 1e9
        return f"set optimisation.activation_checkpointing to true ({total:.0f} GB)"
    if held:
        return (
            "set optimisation.activation_checkpointing to true and both zero_stage to "
            f"{held[0].zero_stages[0]} ({held[0].memory.total / 1e9:.0f} GB)"
        )
    if fitting:
        least = fitting[0]
        checkpointing = "true" if least.checkpointing else "false"
        return (
            f"set optimisation.activation_checkpointing to {checkpointing}, both zero_stage to "
            f"{least.zero_stages[0]} and both offload to {least.offloads[0]} "
            f"({least.memory.total / 1e9:.0f} GB, and {least.memory.offloaded / 1e9:.0f} GB of the "
            "host's memory for each GPU)"
        )
    return "no setting fits: use more GPUs, a smaller optimisation.batch_size, or a larger GPU"
