"""A configuration's two networks."""

import torch

from cat_ray.config import Config
from cat_ray.model.discriminator import Discriminator, DiscriminatorShape
from cat_ray.model.generator import Generator, GeneratorShape


def build_generator(config: Config, autocast_dtype: torch.dtype | None = None) -> Generator:
    """The generator, with random weights."""
    model = config.model
    return Generator(
        GeneratorShape(
            size=model.generator.dimensions(),
            patch=model.generator.patch,
            resolution=model.resolution,
            channels=model.channels,
            num_classes=config.data.num_classes,
            stages=model.stages,
            latent_width=model.generator.latent_width,
            mapping_lr_multiplier=model.generator.mapping_lr_multiplier,
            position_grid=model.generator.position_grid,
            activation_checkpointing=config.optimisation.activation_checkpointing,
            autocast_dtype=autocast_dtype,
        )
    )


def build_discriminator(config: Config, autocast_dtype: torch.dtype | None = None) -> Discriminator:
    """The discriminator, with random weights; a projector only where alignment is on."""
    model, alignment = config.model, config.objective.alignment
    return Discriminator(
        DiscriminatorShape(
            size=model.discriminator.dimensions(),
            patch=model.discriminator.patch,
            scales=model.scales(),
            channels=model.channels,
            num_classes=config.data.num_classes,
            projection_width=model.discriminator.projection_width,
            class_lr_multiplier=model.discriminator.class_lr_multiplier,
            scope=model.discriminator.scope,
            teacher_width=alignment.teacher_width if alignment.weight else None,
            position_grid=model.discriminator.position_grid,
            activation_checkpointing=config.optimisation.activation_checkpointing,
            autocast_dtype=autocast_dtype,
        )
    )


def compile_blocks(network: Generator | Discriminator) -> None:
    """Has torch.compile make one kernel graph that all of a network's equal blocks share.

    The names of the parameters stay. PyTorch keeps what it compiled on the machine's disk.
    """
    for block in network.blocks:
        block.compile()
