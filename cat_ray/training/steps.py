"""The discriminator's and the generator's step, in the words of the paper.

Figures and losses are sums over this worker's images divided by the global batch: added up over
the workers they are the batch's mean, whatever the workers' shares.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_ray.config import Config
from cat_ray.objective.adversarial import discriminator_loss, generator_loss
from cat_ray.objective.alignment import Teacher, alignment_loss
from cat_ray.objective.augment import augment, augment_stages, move
from cat_ray.objective.consistency import consistency
from cat_ray.objective.penalty import finite_difference
from cat_ray.objective.pyramid import real_pyramid, stage_pyramid
from cat_ray.training.averaging import Averages
from cat_ray.training.draws import StepDraws
from cat_ray.training.engines import Engine
from cat_ray.training.parts import part
from cat_ray.training.reals import Reals

Figures = dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the networks at once: some of a worker's lanes, n images.

    Attributes:
        reals: the real images.
        labels: their classes `[n]`, which the fakes share.
        draws: their random numbers.
        last: of the worker's part of a batch: with it the networks move.
    """

    reals: Reals
    labels: Tensor
    draws: StepDraws
    last: bool = True


@dataclass(frozen=True)
class Adversaries:
    """The two engines, and the frozen teacher where alignment is on."""

    config: Config
    generator: Engine
    discriminator: Engine
    teacher: Teacher | None = None


def training_step(
    adversaries: Adversaries, averages: Averages, micro_batches: Sequence[MicroBatch]
) -> tuple[Figures, list[Tensor]]:
    """Moves D, then G, then G's averages, by a worker's part of a batch.

    Returns:
        The step's figures, and each micro-batch's stage outputs `[K, n, c, R, R]`, detached.
    """
    generator, optimisation = adversaries.generator, adversaries.config.optimisation
    # The fakes' graph is kept through the discriminator's step only where all are made at once.
    reuse = optimisation.reuse_generator_forward and len(micro_batches) == 1

    @part("G forward")
    def made(micro_batch: MicroBatch) -> Tensor:
        return generator(micro_batch.draws.latents, micro_batch.labels)

    with torch.set_grad_enabled(reuse):
        fakes = [made(each) for each in micro_batches]
    figures = add_up(
        discriminator_step(adversaries, each, outputs.detach())
        for each, outputs in zip(micro_batches, fakes, strict=True)
    )
    figures |= add_up(
        generator_step(adversaries, each, outputs if reuse else made(each))
        for each, outputs in zip(micro_batches, fakes, strict=True)
    )
    averages.update()
    return figures, [outputs.detach() for outputs in fakes]


@part("D step")
def discriminator_step(
    adversaries: Adversaries, micro_batch: MicroBatch, outputs: Tensor
) -> Figures:
    """Tells reals from fakes at every scale, with R1, R2 and alignment; moves only D.

    Args:
        adversaries: the two engines.
        micro_batch: n images; D moves after the last of a batch.
        outputs: the fakes' stage outputs `[K, n, c, R, R]`, detached.
    """
    reals, labels, draws = micro_batch.reals, micro_batch.labels, micro_batch.draws
    config, engine = adversaries.config, adversaries.discriminator
    objective, batch = config.objective, config.optimisation.batch_size
    policy, penalty = objective.augment.policy(), objective.penalty
    scales, images = config.model.scales(), reals.images
    # Without the penalty nothing is perturbed.
    rows = draws.penalised if penalty.weight else draws.penalised[:0]

    def perturbed(images: Tensor, noise: Tensor) -> Tensor:
        return images[rows] + penalty.sigma * noise[: len(rows)]

    real = real_pyramid(augment(images, draws.discriminator_real, policy), scales)
    fake = stage_pyramid(augment_stages(outputs, draws.discriminator_fake, policy), scales)
    # One pass for all of them: no layer mixes images.
    judged = [
        torch.cat([x, h, perturbed(x, eps), perturbed(h, eta)])
        for x, h, eps, eta in zip(real, fake, draws.noise_real, draws.noise_fake, strict=True)
    ]
    judged_labels = torch.cat([labels, labels, labels[rows], labels[rows]])
    aligned_rows = len(images) if adversaries.teacher else 0
    with part("D forward"):
        logits, projected = engine(judged, judged_labels, aligned_rows)
    real_logits, fake_logits, near_real, near_fake = logits.split(
        [len(images), len(images), len(rows), len(rows)]
    )

    def slope(at: Tensor, near: Tensor) -> Tensor:
        squares = finite_difference(at[rows], near, penalty.sigma, penalty.reduction)
        return squares.sum() / (config.penalised_per_lane() * config.optimisation.lanes)

    adversarial = discriminator_loss(real_logits, fake_logits).sum() / batch
    r1, r2 = slope(real_logits, near_real), slope(fake_logits, near_fake)
    loss = adversarial + penalty.weight / 2 * (r1 + r2)
    figures = {"d_loss": adversarial, "r1": r1, "r2": r2}
    if adversaries.teacher is not None and projected is not None and reals.pictures is not None:
        grid = scales[-1] // config.model.discriminator.patch
        target = adversaries.teacher(move(reals.pictures, draws.discriminator_real), grid)
        aligned = alignment_loss(projected, target).sum() / batch
        loss = loss + objective.alignment.weight * aligned
        figures["alignment"] = aligned
    figures["real_logit"] = real_logits.mean(dim=1).sum() / batch
    figures["fake_logit"] = fake_logits.mean(dim=1).sum() / batch
    figures["d_accuracy"] = (real_logits > fake_logits).float().mean(dim=1).sum() / batch
    engine.descend(loss, micro_batch.last)
    if micro_batch.last:
        figures["discriminator_gradient_norm"] = engine.gradient_norm()
    return {name: value.detach() for name, value in figures.items()}


@part("G step")
def generator_step(adversaries: Adversaries, micro_batch: MicroBatch, outputs: Tensor) -> Figures:
    """Makes every stage win at its scale and agree with the final output; moves only G.

    `outputs` carry the generator's graph; otherwise as `discriminator_step`.
    """
    images, labels, draws = micro_batch.reals.images, micro_batch.labels, micro_batch.draws
    config, judge = adversaries.config, adversaries.discriminator.module
    objective, batch = config.objective, config.optimisation.batch_size
    policy, scales = objective.augment.policy(), config.model.scales()

    real = real_pyramid(augment(images, draws.generator_real, policy), scales)
    fake = stage_pyramid(augment_stages(outputs, draws.generator_fake, policy), scales)
    # Frozen, and called as a bare module: no gradient reaches D, no hook of its engine fires.
    judge.requires_grad_(False)
    # Apart from the fakes: in one pass the way back would be gone through for the reals as well.
    with part("D forward"):
        with torch.no_grad():
            real_logits, _ = judge(real, labels)
        fake_logits, _ = judge(fake, labels)
    adversarial = generator_loss(real_logits, fake_logits).sum() / batch
    tied = objective.consistency
    with torch.set_grad_enabled(tied.weight > 0):
        agreement = consistency(outputs, config.stage_weights(), tied.stop_gradient).sum() / batch
    loss = adversarial + tied.weight * agreement
    adversaries.generator.descend(loss, micro_batch.last)
    judge.requires_grad_(True)
    figures = {"g_loss": adversarial.detach(), "consistency": agreement.detach()}
    if micro_batch.last:
        figures["generator_gradient_norm"] = adversaries.generator.gradient_norm()
    return figures


def add_up(parts: Iterable[Figures]) -> Figures:
    """The figures of a batch from those of its micro-batches."""
    total: Figures = {}
    for figures in parts:
        for name, value in figures.items():
            total[name] = total[name] + value if name in total else value
    return total
