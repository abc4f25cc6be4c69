"""What a training job needs of the nodes, from its configuration alone."""

import torch

from cat_ray.config import Config
from cat_ray.data.stream import WINDOWS_AHEAD
from cat_ray.doctor.facts import Needs
from cat_ray.model.build import build_discriminator, build_generator

FP32_BYTES, MOMENTS = 4, 2


def needs_of(config: Config) -> Needs:
    """What a job needs. The networks are built on the meta device, which takes no memory."""
    with torch.device("meta"):
        networks = build_generator(config), build_discriminator(config)
    generator, discriminator = (
        sum(parameter.numel() for parameter in network.parameters()) for network in networks
    )
    averages = len(config.optimisation.ema_decays) * generator
    numbers = (1 + MOMENTS) * (generator + discriminator) + averages
    workers = config.workers
    return Needs(
        gpu=workers.gpu,
        workers=workers.minimum,
        most_workers=workers.maximum,
        cpus_per_worker=workers.cpus_per_worker,
        # The window that is trained on, and those that are read ahead.
        window_bytes=(1 + WINDOWS_AHEAD) * config.data.window_megabytes * 10**6,
        checkpoint_bytes=FP32_BYTES * numbers,
    )
