"""All random numbers of one step, drawn lane by lane."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cat_ray.config import Config
from cat_ray.objective.augment import AugmentDraws, concatenate, draw
from cat_ray.training.parts import part
from cat_ray.training.placement import to_device
from cat_ray.training.randomness import Purpose, random_stream


@dataclass(frozen=True)
class StepDraws:
    """The random numbers of a micro-batch of n images, P of them penalised.

    Attributes:
        latents: `[n, latent_width]`, for the fakes of both steps.
        discriminator_real, discriminator_fake: augmentation in the discriminator's step.
        generator_real, generator_fake: augmentation in the generator's step.
        penalised: which of the n images the penalty is measured on, `[P]`.
        posterior: of the reals' latents, `[n, c, R, R]`, where the networks work on latents.
        noise_real, noise_fake: the penalty's perturbations, a `[P, c, s_k, s_k]` for each scale.
    """

    latents: Tensor
    discriminator_real: AugmentDraws
    discriminator_fake: AugmentDraws
    generator_real: AugmentDraws
    generator_fake: AugmentDraws
    penalised: Tensor
    noise_real: list[Tensor]
    noise_fake: list[Tensor]
    posterior: Tensor | None = None


@part("draws")
def draw_step(
    config: Config,
    lanes: range,
    step: int,
    device: torch.device,
    noise_stream: int = 0,
    posterior: bool = False,
) -> StepDraws:
    """The draws of some lanes at a step: a function of (seed, purpose, step, lane) alone.

    A run that was rolled back goes on with another noise stream, and so with other draws.
    """
    lane_size, penalised = config.optimisation.lane_size, config.penalised_per_lane()
    channels, side = config.model.channels, config.model.resolution
    policy = config.objective.augment.policy()

    def streams(purpose: Purpose) -> list[np.random.Generator]:
        position = (noise_stream,) if noise_stream else ()
        return [random_stream(config.run.seed, purpose, step, lane, *position) for lane in lanes]

    def normal(each_lane: list[np.random.Generator], *shape: int) -> Tensor:
        parts = [lane.standard_normal(shape, dtype=np.float32) for lane in each_lane]
        return to_device(torch.from_numpy(np.concatenate(parts)), device)

    def augmentation(purpose: Purpose) -> AugmentDraws:
        parts = [draw(policy, lane_size, side, lane) for lane in streams(purpose)]
        return concatenate(parts).each(lambda values: to_device(values, device))

    def noise(purpose: Purpose) -> list[Tensor]:
        each_lane = streams(purpose)
        return [normal(each_lane, penalised, channels, s, s) for s in config.model.scales()]

    rows = torch.arange(len(lanes) * lane_size).view(len(lanes), lane_size)
    return StepDraws(
        latents=normal(streams(Purpose.LATENT), lane_size, config.model.generator.latent_width),
        discriminator_real=augmentation(Purpose.DISCRIMINATOR_AUGMENT_REAL),
        discriminator_fake=augmentation(Purpose.DISCRIMINATOR_AUGMENT_FAKE),
        generator_real=augmentation(Purpose.GENERATOR_AUGMENT_REAL),
        generator_fake=augmentation(Purpose.GENERATOR_AUGMENT_FAKE),
        # A lane's samples are in random order already: its first ones are a random share.
        penalised=to_device(rows[:, :penalised].flatten(), device),
        noise_real=noise(Purpose.PENALTY_REAL),
        noise_fake=noise(Purpose.PENALTY_FAKE),
        posterior=normal(streams(Purpose.POSTERIOR), lane_size, channels, side, side)
        if posterior
        else None,
    )
