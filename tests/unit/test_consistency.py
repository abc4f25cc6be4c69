"""The consistency term: its value, and which heads each form of it pulls on."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from cat_ray.objective.consistency import consistency
from cat_ray.objective.settings import default_stage_weights

STAGES = 4


def random_outputs(stages: int = STAGES, images: int = 3) -> Tensor:
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(stages, images, 2, 4, 4, generator=numbers, dtype=torch.float64)


def head_gradients(term: int, stop_gradient: str) -> tuple[Tensor, Tensor]:
    """Gradients of the k-th term alone at the four heads' residuals, and the outputs."""
    residuals = random_outputs().requires_grad_()
    outputs = torch.stack(list(accumulate(residuals)))
    weights = [float(stage == term) for stage in range(1, STAGES)]
    consistency(outputs, weights, stop_gradient).sum().backward()
    return residuals.grad, outputs.detach()


@pytest.mark.parametrize(
    ("stop_gradient", "term", "pulled"),
    [
        ("none", 1, {2, 3, 4}),
        ("none", 2, {3, 4}),
        ("none", 3, {4}),
        ("final", 1, {1}),
        ("final", 2, {1, 2}),
        ("final", 3, {1, 2, 3}),
        ("intermediate", 1, {1, 2, 3, 4}),
        ("intermediate", 2, {1, 2, 3, 4}),
        ("intermediate", 3, {1, 2, 3, 4}),
    ],
)
def test_which_heads_each_term_pulls_on(stop_gradient, term, pulled):
    gradients, outputs = head_gradients(term, stop_gradient)
    # All that are pulled are pulled alike: along the distance still to go, or against it.
    gap = outputs[-1] - outputs[term - 1]
    pull = 2 * gap / gap[0].numel() / (STAGES - 1)
    toward_final = -pull if stop_gradient == "final" else pull
    for head in range(1, STAGES + 1):
        expected = toward_final if head in pulled else torch.zeros_like(pull)
        torch.testing.assert_close(gradients[head - 1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stop_gradient", ["none", "final", "intermediate"])
def test_stopping_a_gradient_leaves_the_value(stop_gradient):
    outputs = random_outputs()
    weights = default_stage_weights(STAGES)
    value = consistency(outputs, weights, stop_gradient)
    assert torch.equal(value, consistency(outputs, weights))


def test_no_gradient_is_stopped_unless_asked():
    outputs = random_outputs().requires_grad_()
    consistency(outputs, default_stage_weights(STAGES)).sum().backward()
    assert outputs.grad.flatten(1).any(dim=1).all()


@pytest.mark.parametrize(("stages", "weights"), [(2, [1]), (3, [1 / 2, 1]), (4, [1 / 3, 1 / 2, 1])])
def test_default_weights_divide_by_the_number_of_residuals_spanned(stages, weights):
    assert default_stage_weights(stages) == pytest.approx(weights)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("scheme", ["default", "uneven"])
def test_the_value_is_the_formula_computed_number_by_number(stages, scheme):
    outputs = random_outputs(stages)
    uneven = [0.25, 3.0, 0.5][: stages - 1]
    weights = default_stage_weights(stages) if scheme == "default" else uneven
    numbers = outputs.flatten(2).tolist()
    for image, value in enumerate(consistency(outputs, weights).tolist()):
        final = numbers[-1][image]
        total = 0.0
        for stage, weight in enumerate(weights):
            squares = [(a - b) ** 2 for a, b in zip(numbers[stage][image], final, strict=True)]
            total += weight * sum(squares) / len(squares)
        assert value == pytest.approx(total / (stages - 1), rel=1e-12)


def test_it_is_zero_only_when_every_stage_agrees_with_the_last():
    outputs = random_outputs()[-1:].expand(STAGES, -1, -1, -1, -1).clone()
    weights = default_stage_weights(STAGES)
    assert not consistency(outputs, weights).any()
    for stage in range(STAGES):
        moved = outputs.clone()
        moved[stage, 1] += 0.1
        assert (consistency(moved, weights) > 0).tolist() == [False, True, False]
