"""A checkpoint's size, how long a save takes, and how often to save."""

import math
from dataclasses import dataclass

from cat_ray.checkpoint.layout import (
    DISCRIMINATOR,
    DISCRIMINATOR_MOMENTS,
    GENERATOR,
    GENERATOR_MOMENTS,
    average_group,
)
from cat_ray.config import Config

FLOAT_BYTES = 4
# What a slice costs beside its values: its entries in a file's header, in its worker's part and in
# the manifest. Those of the quickstart's checkpoint, divided by its 611 slices (25 November 2026).
BYTES_PER_SLICE = 420


@dataclass(frozen=True)
class Rates:
    """How fast bytes go, in bytes per second: estimates until `cat-ray bench checkpoint` measures.

    Attributes:
        copy: from a GPU to the host's memory, of each worker.
        disk: to a machine's local disk, of all its workers together.
        upload: from a machine to the storage.
        restore: from the storage to a machine, by all who read there together.
    """

    copy: float = 10e9
    disk: float = 1e9
    upload: float = 200e6
    restore: float = 1e9


@dataclass(frozen=True)
class SaveTimes:
    """Seconds of a save, and of reading it again.

    Attributes:
        stall: what training stands still at most: the copy, which hides behind the next gradients.
        stored: until the checkpoint is complete on the storage.
        restore: until a new group has read it.
    """

    stall: float
    stored: float
    restore: float


def checkpoint_elements(config: Config, generator: int, discriminator: int) -> dict[str, int]:
    """The elements of each group of a checkpoint, as `training/state.py` saves them.

    Args:
        config: the job.
        generator: the network's parameters.
        discriminator: likewise.
    """
    averages = {average_group(decay): generator for decay in config.optimisation.ema_decays}
    return {
        GENERATOR: generator,
        GENERATOR_MOMENTS: 2 * generator,
        **averages,
        DISCRIMINATOR: discriminator,
        DISCRIMINATOR_MOMENTS: 2 * discriminator,
    }


def checkpoint_bytes(config: Config, generator: int, discriminator: int, slices: int) -> int:
    """The size of a whole checkpoint's files."""
    elements = checkpoint_elements(config, generator, discriminator)
    return FLOAT_BYTES * sum(elements.values()) + BYTES_PER_SLICE * slices


def slice_count(config: Config, generator: int, discriminator: int, workers: int) -> int:
    """How many slices a checkpoint has, at most: ZeRO 0 and 3 cut every tensor, 1 and 2 the whole.

    Args:
        config: the job.
        generator: the network's tensors.
        discriminator: likewise.
        workers: who save.
    """
    optimisation, count = config.optimisation, 0
    for group, tensors in checkpoint_elements(config, generator, discriminator).items():
        of_generator = group.startswith(GENERATOR)
        engine = optimisation.generator if of_generator else optimisation.discriminator
        cuts = tensors if engine.zero_stage in (0, 3) else min(1, tensors)
        count += tensors + cuts * (workers - 1)
    return count


def bytes_to_restore(config: Config, generator: int, discriminator: int, workers: int) -> float:
    """What one of so many workers reads as it starts: all weights and averages, its own moments.

    So does `training/state.py`: each worker for itself, also those that share a machine.
    """
    elements = checkpoint_elements(config, generator, discriminator)
    moments = elements[GENERATOR_MOMENTS] + elements[DISCRIMINATOR_MOMENTS]
    return FLOAT_BYTES * (sum(elements.values()) - moments + moments / workers)


def save_times(
    bytes: int, worker_restores: float, workers: int, machines: int, rates: Rates
) -> SaveTimes:
    """A save by so many workers on so many machines, each with an equal part, and its restore.

    Args:
        bytes: of the checkpoint.
        worker_restores: bytes that a worker reads as it starts.
        workers: who save.
        machines: they are on.
        rates: how fast bytes go.
    """
    on_machine = bytes / machines
    return SaveTimes(
        stall=bytes / workers / rates.copy,
        # Local first, then uploaded.
        stored=on_machine / rates.disk + on_machine / rates.upload,
        # The driver checks every hash first; then all machines read at the same time.
        restore=(bytes + worker_restores * workers / machines) / rates.restore,
    )


def best_interval_seconds(stall_seconds: float, interruptions_per_hour: float) -> float:
    """The time between saves that loses least: sqrt(2 x save x time between interruptions).

    Source: J. W. Young, A First Order Approximation to the Optimum Checkpoint Interval, CACM 17(9),
    1974; J. T. Daly, A Higher Order Estimate of the Optimum Checkpoint Interval for Restart Dumps,
    FGCS 22(3), 2006. Infinite without interruptions.
    """
    if interruptions_per_hour == 0:
        return math.inf
    return math.sqrt(2 * stall_seconds * 3600 / interruptions_per_hour)
