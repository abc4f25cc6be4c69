"""The discriminator's and the generator's step, in the words of the paper.

Figures and losses are sums over this worker's images divided by the global batch: added up over
the workers they are the batch's mean, whatever the workers' shares.
"""

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
class Adversaries:
    """The two engines, and the frozen teacher where alignment is on."""

    config: Config
    generator: Engine
    discriminator: Engine
    teacher: Teacher | None = None


def training_step(
    adversaries: Adversaries, averages: Averages, reals: Reals, labels: Tensor, draws: StepDraws
) -> tuple[Figures, Tensor]:
    """Moves D, then G, then G's averages.

    Returns:
        The step's figures, and the stage outputs `[K, n, c, R, R]`, detached.
    """
    generator = adversaries.generator
    reuse = adversaries.config.optimisation.reuse_generator_forward
    with part("G forward"), torch.set_grad_enabled(reuse):
        outputs = generator(draws.latents, labels)
    figures = discriminator_step(adversaries, reals, labels, outputs.detach(), draws)
    if not reuse:
        with part("G forward"):
            outputs = generator(draws.latents, labels)
    figures |= generator_step(adversaries, reals.images, labels, outputs, draws)
    averages.update()
    return figures, outputs.detach()


@part("D step")
def discriminator_step(
    adversaries: Adversaries, reals: Reals, labels: Tensor, outputs: Tensor, draws: StepDraws
) -> Figures:
    """Tells reals from fakes at every scale, with R1, R2 and alignment; moves only D.

    Args:
        adversaries: the two engines.
        reals: real images, n of them.
        labels: their classes `[n]`, which the fakes share.
        outputs: the fakes' stage outputs `[K, n, c, R, R]`, detached.
        draws: the step's random numbers.
    """
    config, engine = adversaries.config, adversaries.discriminator
    objective, batch = config.objective, config.optimisation.batch_size
    policy, penalty = objective.augment.policy(), objective.penalty
    scales, rows, images = config.model.scales(), draws.penalised, reals.images

    real = real_pyramid(augment(images, draws.discriminator_real, policy), scales)
    fake = stage_pyramid(augment_stages(outputs, draws.discriminator_fake, policy), scales)
    judged = [
        torch.cat([x, h, x[rows] + penalty.sigma * eps, h[rows] + penalty.sigma * eta])
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
    engine.descend(loss)
    figures["discriminator_gradient_norm"] = engine.gradient_norm()
    return {name: value.detach() for name, value in figures.items()}


@part("G step")
def generator_step(
    adversaries: Adversaries, images: Tensor, labels: Tensor, outputs: Tensor, draws: StepDraws
) -> Figures:
    """Makes every stage win at its scale and agree with the final output; moves only G.

    `images` are the reals, `[n, c, R, R]`, and `outputs` carry the generator's graph; the other
    arguments are as in `discriminator_step`.
    """
    config, judge = adversaries.config, adversaries.discriminator.module
    objective, batch = config.objective, config.optimisation.batch_size
    policy, scales = objective.augment.policy(), config.model.scales()

    real = real_pyramid(augment(images, draws.generator_real, policy), scales)
    fake = stage_pyramid(augment_stages(outputs, draws.generator_fake, policy), scales)
    judged = [torch.cat(pair) for pair in zip(real, fake, strict=True)]
    # Frozen, and called as a bare module: no gradient reaches D, no hook of its engine fires.
    judge.requires_grad_(False)
    with part("D forward"):
        logits, _ = judge(judged, torch.cat([labels, labels]))
    real_logits, fake_logits = logits.chunk(2)
    adversarial = generator_loss(real_logits.detach(), fake_logits).sum() / batch
    tied = objective.consistency
    agreement = consistency(outputs, config.stage_weights(), tied.stop_gradient).sum() / batch
    loss = adversarial + tied.weight * agreement
    adversaries.generator.descend(loss)
    judge.requires_grad_(True)
    return {
        "g_loss": adversarial.detach(),
        "consistency": agreement.detach(),
        "generator_gradient_norm": adversaries.generator.gradient_norm(),
    }
