"""Losses on logits: the relativistic pairing, and the penalty against exact gradients in fp64."""

import math

import pytest
import torch
from torch import Tensor

from cat_ray.objective.adversarial import discriminator_loss, generator_loss
from cat_ray.objective.penalty import finite_difference

SCALES, IMAGES, PIXELS = 4, 3, 6


def random(*shape: int, seed: int = 0) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=numbers, dtype=torch.float64)


DIRECTIONS = random(SCALES, PIXELS, seed=1)
PYRAMID = random(IMAGES, SCALES, PIXELS, seed=2)


def linear(pyramid: Tensor) -> Tensor:
    """Logits `[..., K]` of `[..., K, pixels]`, each scale's from its own pixels."""
    return (pyramid * DIRECTIONS).sum(dim=-1)


def curved(pyramid: Tensor) -> Tensor:
    return torch.tanh(linear(pyramid)) + 0.5 * (pyramid * pyramid.roll(1, dims=-1)).sum(dim=-1)


def exact_noise(draws: int, seed: int = 3) -> Tensor:
    """Draws of one image's noise with mean zero and unit covariance to the last digit.

    An average over them is the expectation of any quadratic form, with no sampling error.
    """
    half = random(draws // 2, SCALES * PIXELS, seed=seed)
    covariance = half.T @ half / len(half)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), half.T, upper=False).T
    return torch.cat([white, -white]).view(draws, 1, SCALES, PIXELS)


def squared_gradients(judge) -> Tensor:
    """|dD_k/dx|^2 of each image and scale by autograd, `[B, K]`."""
    pyramid = PYRAMID.clone().requires_grad_()
    logits = judge(pyramid)
    rows = [
        torch.autograd.grad(logits[:, scale].sum(), pyramid, retain_graph=True)[0]
        for scale in range(SCALES)
    ]
    return torch.stack([row.square().sum(dim=(1, 2)) for row in rows], dim=1)


def squared_gradient_of_sum(judge) -> Tensor:
    pyramid = PYRAMID.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(judge(pyramid).sum(), pyramid)
    return gradient.square().sum(dim=(1, 2))


def expected_penalty(judge, sigma: float, reduction: str, noise: Tensor) -> Tensor:
    perturbed = judge(PYRAMID + sigma * noise)
    logits = judge(PYRAMID).expand_as(perturbed)
    rows = finite_difference(
        logits.flatten(0, 1), perturbed.flatten(0, 1), sigma, reduction=reduction
    )
    return rows.view(len(noise), IMAGES).mean(dim=0)


def target(judge, reduction: str) -> Tensor:
    if reduction == "mean":
        return squared_gradients(judge).mean(dim=1)
    return squared_gradient_of_sum(judge)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sigma", [1e-3, 0.01, 1.0, 30.0])
def test_for_a_linear_discriminator_it_is_the_squared_gradient_at_every_sigma(sigma, reduction):
    penalty = expected_penalty(linear, sigma, reduction, exact_noise(256))
    torch.testing.assert_close(penalty, target(linear, reduction), rtol=1e-8, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_tends_to_the_squared_gradient_as_sigma_vanishes(reduction):
    noise, limit = exact_noise(2048), target(curved, reduction)

    def error(sigma: float) -> Tensor:
        return (expected_penalty(curved, sigma, reduction, noise) - limit).abs() / limit

    assert (error(1.0) > 0.1).all()
    assert (error(1e-4) < 1e-6).all()
    # The noise is symmetric, so the error is of second order.
    torch.testing.assert_close(
        error(1e-2) / error(5e-3), torch.full_like(limit, 4.0), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_plain_normal_noise_comes_to_the_squared_gradient_on_average(reduction):
    draws = 40_000
    noise = random(draws, IMAGES, SCALES, PIXELS, seed=4)
    penalty = expected_penalty(curved, 0.01, reduction, noise)
    # A squared normal variable has a relative deviation of sqrt(2).
    six_deviations = 6 * math.sqrt(2 / draws)
    torch.testing.assert_close(penalty, target(curved, reduction), rtol=six_deviations, atol=0)


@pytest.mark.parametrize(("judge", "sigma"), [(linear, 1.0), (curved, 1e-4)])
def test_sum_is_as_many_times_mean_as_there_are_scales(judge, sigma):
    noise = exact_noise(2048)
    mean, total = (expected_penalty(judge, sigma, r, noise) for r in ("mean", "sum"))
    torch.testing.assert_close(total, SCALES * mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("mean", [(1 + 4 + 0) / 3, 4.0]), ("sum", [(1.0 + 2 + 0) ** 2, (2.0 - 2 + 2) ** 2])],
)
def test_a_table_worked_by_hand(reduction, expected):
    logits = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    perturbed = torch.tensor([[0.5, 0.0, 1.0], [-1.0, 1.0, -1.0]])
    penalty = finite_difference(logits, perturbed, sigma=0.5, reduction=reduction)
    torch.testing.assert_close(penalty, torch.tensor(expected))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_flattens_the_discriminator_at_both_ends(reduction):
    logits, perturbed = random(2, 4, seed=5), random(2, 4, seed=6)
    logits.requires_grad_()
    perturbed.requires_grad_()
    finite_difference(logits, perturbed, 0.1, reduction).sum().backward()
    assert (logits.grad != 0).all()
    torch.testing.assert_close(logits.grad, -perturbed.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_a_perturbation_there_is_nothing_to_punish(reduction):
    logits = random(2, 4)
    assert not finite_difference(logits, logits.clone(), 0.01, reduction).any()


@pytest.mark.parametrize("loss", [discriminator_loss, generator_loss])
def test_equal_logits_cost_ln_2_whatever_their_common_offset(loss):
    logits = random(5, 4)
    expected = torch.full((5,), math.log(2), dtype=torch.float64)
    torch.testing.assert_close(loss(logits, logits), expected)
    real, fake = random(5, 4, seed=7), random(5, 4, seed=8)
    torch.testing.assert_close(loss(real + 3.0, fake + 3.0), loss(real, fake))


@pytest.mark.parametrize(
    ("loss", "real_wants"), [(discriminator_loss, "up"), (generator_loss, "down")]
)
def test_the_players_pull_the_same_difference_in_opposite_directions(loss, real_wants):
    real, fake = random(5, 4, seed=7).requires_grad_(), random(5, 4, seed=8).requires_grad_()
    loss(real, fake).sum().backward()
    assert ((real.grad < 0) if real_wants == "up" else (real.grad > 0)).all()
    torch.testing.assert_close(real.grad, -fake.grad)


def test_pairs_are_judged_scale_by_scale_and_then_averaged():
    real = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    fake = torch.tensor([[0.0, 2.0], [1.0, 0.0]])

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    against = [(softplus(-2) + softplus(2)) / 2, (softplus(0) + softplus(-1)) / 2]
    torch.testing.assert_close(discriminator_loss(real, fake), torch.tensor(against))
    fooled = [(softplus(2) + softplus(-2)) / 2, (softplus(0) + softplus(1)) / 2]
    torch.testing.assert_close(generator_loss(real, fake), torch.tensor(fooled))


@pytest.mark.parametrize("loss", [discriminator_loss, generator_loss])
def test_a_hopeless_pair_costs_its_distance_and_stays_finite(loss):
    far, near = torch.full((1, 2), 500.0), torch.full((1, 2), -500.0)
    costs = sorted([loss(far, near).item(), loss(near, far).item()])
    assert costs == pytest.approx([0.0, 1000.0])
