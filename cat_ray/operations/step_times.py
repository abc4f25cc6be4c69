"""How long a step takes, part by part, on a batch in memory: measured in whatever process runs it.

No Ray here: plain PyTorch is measured by the same functions.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cat_ray.config import Config
from cat_ray.data.latent_shape import IMAGE_CHANNELS, REDUCTION
from cat_ray.data.read import Batch, Reading
from cat_ray.storage import locate
from cat_ray.training.lanes import micro_batches, share
from cat_ray.training.micro_batches import micro_batches_of
from cat_ray.training.parts import measured
from cat_ray.training.reals import RealsMaker
from cat_ray.training.state import TrainingState

COMMUNICATION = "communication"
REST = "rest"
# What a process holds still grows in the second one, and new memory takes time.
WARM_UP_STEPS = 3
MATMUL_SIDE, MATMULS = 1536, 8


@dataclass(frozen=True)
class StepTimes:
    """One process's steps in one repetition.

    Attributes:
        seconds: of a step, on average, without measuring its parts.
        parts: seconds of a step by part, on average over other steps; their sum is a step.
        memory_bytes: the most that was held: of the process, or on a GPU of tensors.
        device: its name, `cpu` without a GPU.
        peak: operations a second of a large product of matrices, one thread; 0 on a GPU.
    """

    seconds: float
    parts: Mapping[str, float]
    memory_bytes: int
    device: str
    peak: float


def steps_on_random_data(
    config: Config,
    state: TrainingState,
    device: torch.device,
    step: Callable[..., Any],
    world_size: int = 1,
    rank: int = 0,
) -> Callable[[int], Any]:
    """A function that takes the n-th step, always on the same random batch.

    Args:
        config: the job.
        state: what is trained.
        device: where.
        step: with the arguments of `training_step`.
        world_size: how many processes share the batch.
        rank: of this one.
    """
    optimisation, reading = config.optimisation, _reading(config)
    own = _random_batch(config, reading, share(optimisation.lanes, world_size, rank))
    maker = RealsMaker(config, reading, device)
    parts = micro_batches(optimisation.lanes, world_size, rank, optimisation.micro_batch_lanes)

    def take(place: int) -> Any:
        made = micro_batches_of(config, own, parts, place, maker, device)
        return step(state.adversaries, state.averages, made)

    return take


def measure_steps(
    take: Callable[[int], Any], device: torch.device, steps: int, peak: float = 0.0
) -> StepTimes:
    """Takes some steps to warm up, as many as asked for, and as many again part by part."""
    on_gpu = device.type == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    for place in range(WARM_UP_STEPS):
        take(place)
    wait()
    began = time.perf_counter()
    for place in range(steps):
        take(place)
    wait()
    seconds = (time.perf_counter() - began) / steps
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else _peak_resident_bytes()
    with measured(device) as times:
        for place in range(steps):
            take(place)
        wait()
    return StepTimes(
        seconds=seconds,
        parts=by_row({path: total / steps for path, total in times.seconds.items()}),
        memory_bytes=memory,
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        peak=peak,
    )


def by_row(seconds: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    """Parts by the name that a table gives them, in their order; what lies in none comes last.

    Communication is one part, wherever it happens.
    """
    rows: dict[str, float] = {}
    around = {path[:-1] for path in seconds if COMMUNICATION not in path}
    for path, value in seconds.items():
        if COMMUNICATION in path:
            name = COMMUNICATION
        else:
            name = ": ".join([*path, REST] if path in around else path)
        rows[name] = rows.get(name, 0.0) + value
    if REST in rows:
        rows[REST] = rows.pop(REST)
    return rows


def measure_matmul() -> float:
    """Operations a second of this process on the CPU, the best of some products of matrices."""
    a = torch.randn(MATMUL_SIDE, MATMUL_SIDE)
    best = float("inf")
    for _ in range(MATMULS):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * MATMUL_SIDE**3 / best


def _reading(config: Config) -> Reading:
    """How shards that fit the job would be read."""
    model, encode = config.model, config.latents.vae is not None
    return Reading(
        folder=locate(config.data.shards),
        contents="latents" if config.makes_latents() and not encode else "images",
        resolution=model.resolution * (REDUCTION if encode else 1),
        channels=IMAGE_CHANNELS if encode else model.channels,
        crop=False,
        num_classes=config.data.num_classes,
    )


def _random_batch(config: Config, reading: Reading, lanes: range) -> Batch:
    """These lanes of a batch of random numbers."""
    random, size = np.random.default_rng(0), config.optimisation.lane_size
    batch = Batch.empty(reading, config.optimisation.batch_size)
    values = random.random(batch.content.shape, np.float32)
    batch.content[:] = values * 255 if reading.contents == "images" else values
    batch.labels[:] = random.integers(0, config.data.num_classes, len(batch.labels))
    return batch.rows(lanes.start * size, lanes.stop * size)


def _peak_resident_bytes() -> int:
    status: Sequence[str] = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
