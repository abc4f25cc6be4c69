"""The step in the straightforward order of the reference recipe, to measure ours against.

The generator runs twice, without a gradient for D's step and again for its own; D judges reals,
fakes and their perturbed copies one after the other, as GAT's code does. Losses and random numbers
are those of `training/steps.py`: so are the gradients, but for rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cat_ray.objective.adversarial import discriminator_loss, generator_loss
from cat_ray.objective.alignment import alignment_loss
from cat_ray.objective.augment import augment, augment_stages, move
from cat_ray.objective.consistency import consistency
from cat_ray.objective.penalty import finite_difference
from cat_ray.objective.pyramid import real_pyramid, stage_pyramid
from cat_ray.training.averaging import Averages
from cat_ray.training.parts import part
from cat_ray.training.steps import Adversaries, MicroBatch


def reference_step(
    adversaries: Adversaries, averages: Averages, micro_batches: Sequence[MicroBatch]
) -> None:
    """Moves D, then G, then G's averages; the arguments are those of `training_step`."""

    @part("G forward")
    def made(micro_batch: MicroBatch) -> Tensor:
        return adversaries.generator(micro_batch.draws.latents, micro_batch.labels)

    for each in micro_batches:
        with torch.no_grad():
            outputs = made(each)
        discriminator_step(adversaries, each, outputs)
    for each in micro_batches:
        generator_step(adversaries, each, made(each))
    averages.update()


@part("D step")
def discriminator_step(adversaries: Adversaries, micro_batch: MicroBatch, outputs: Tensor) -> None:
    """D's step by four forward passes."""
    reals, labels, draws = micro_batch.reals, micro_batch.labels, micro_batch.draws
    config, engine = adversaries.config, adversaries.discriminator
    objective, batch = config.objective, config.optimisation.batch_size
    policy, penalty, scales = objective.augment.policy(), objective.penalty, config.model.scales()
    rows, images = draws.penalised, reals.images
    real = real_pyramid(augment(images, draws.discriminator_real, policy), scales)
    fake = stage_pyramid(augment_stages(outputs, draws.discriminator_fake, policy), scales)
    aligned_rows = len(images) if adversaries.teacher else 0
    with part("D forward"):
        real_logits, projected = engine(real, labels, aligned_rows)
    with part("D forward"):
        fake_logits, _ = engine(fake, labels)

    def slope(pyramid: list[Tensor], at: Tensor, noise: list[Tensor]) -> Tensor:
        near = [x[rows] + penalty.sigma * eps for x, eps in zip(pyramid, noise, strict=True)]
        with part("D forward"):
            near_logits, _ = engine(near, labels[rows])
        squares = finite_difference(at[rows], near_logits, penalty.sigma, penalty.reduction)
        return squares.sum() / (config.penalised_per_lane() * config.optimisation.lanes)

    r1 = slope(real, real_logits, draws.noise_real)
    r2 = slope(fake, fake_logits, draws.noise_fake)
    loss = discriminator_loss(real_logits, fake_logits).sum() / batch + penalty.weight / 2 * (
        r1 + r2
    )
    if adversaries.teacher is not None and projected is not None and reals.pictures is not None:
        grid = scales[-1] // config.model.discriminator.patch
        target = adversaries.teacher(move(reals.pictures, draws.discriminator_real), grid)
        loss = loss + objective.alignment.weight * alignment_loss(projected, target).sum() / batch
    engine.descend(loss, micro_batch.last)


@part("G step")
def generator_step(adversaries: Adversaries, micro_batch: MicroBatch, outputs: Tensor) -> None:
    """G's step: D judges the reals without a gradient, and then the fakes."""
    images, labels, draws = micro_batch.reals.images, micro_batch.labels, micro_batch.draws
    config, judge = adversaries.config, adversaries.discriminator.module
    objective, batch = config.objective, config.optimisation.batch_size
    policy, scales = objective.augment.policy(), config.model.scales()
    judge.requires_grad_(False)
    with torch.no_grad():
        real = real_pyramid(augment(images, draws.generator_real, policy), scales)
        with part("D forward"):
            real_logits, _ = judge(real, labels)
    fake = stage_pyramid(augment_stages(outputs, draws.generator_fake, policy), scales)
    with part("D forward"):
        fake_logits, _ = judge(fake, labels)
    tied = objective.consistency
    agreement = consistency(outputs, config.stage_weights(), tied.stop_gradient).sum() / batch
    adversarial = generator_loss(real_logits, fake_logits).sum() / batch
    adversaries.generator.descend(adversarial + tied.weight * agreement, micro_batch.last)
    judge.requires_grad_(True)
