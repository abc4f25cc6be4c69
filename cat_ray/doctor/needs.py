"""What a training job needs of the nodes, from its configuration alone."""

import torch

from cat_ray.config import Config
from cat_ray.data.stream import WINDOWS_AHEAD
from cat_ray.doctor.facts import Needs
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.operations.save_size import FLOAT_BYTES, checkpoint_elements


def needs_of(config: Config) -> Needs:
    """What a job needs. The networks are built on the meta device, which takes no memory."""
    with torch.device("meta"):
        networks = build_generator(config), build_discriminator(config)
    generator, discriminator = (
        sum(parameter.numel() for parameter in network.parameters()) for network in networks
    )
    elements = checkpoint_elements(config, generator, discriminator)
    workers = config.workers
    return Needs(
        gpu=workers.gpu,
        workers=workers.minimum,
        most_workers=workers.maximum,
        cpus_per_worker=workers.cpus_per_worker,
        # The window that is trained on, and those that are read ahead.
        window_bytes=(1 + WINDOWS_AHEAD) * config.data.window_megabytes * 10**6,
        checkpoint_bytes=FLOAT_BYTES * sum(elements.values()),
    )
