"""How well the stages agree: the three measures, against loops over every pixel."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from cat_ray.evaluation.alignment_metrics import alignment_figures, direction, discrepancy, rewrite

STAGES, IMAGES = 4, 3


def outputs() -> Tensor:
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(STAGES, IMAGES, 2, 3, 3, generator=numbers, dtype=torch.float64)


def values(image: Tensor) -> list[float]:
    channels, height, width = image.shape
    return [
        image[c, y, x].item() for c, y, x in product(range(channels), range(height), range(width))
    ]


def mean_square(a: Tensor, b: Tensor) -> float:
    pairs = list(zip(values(a), values(b), strict=True))
    return sum((p - q) ** 2 for p, q in pairs) / len(pairs)


def cosine(a: Tensor, b: Tensor) -> float:
    first, second = values(a), values(b)
    product_sum = sum(p * q for p, q in zip(first, second, strict=True))
    return product_sum / math.sqrt(sum(p * p for p in first) * sum(q * q for q in second))


def test_discrepancy_is_the_mean_square_distance_to_the_final_output():
    h = outputs()
    found = discrepancy(h)
    assert found.shape == (STAGES - 1, IMAGES)
    for k, b in product(range(STAGES - 1), range(IMAGES)):
        assert found[k, b].item() == pytest.approx(mean_square(h[k, b], h[-1, b]))


def test_rewrite_is_the_mean_square_of_what_a_stage_changes():
    h = outputs()
    found = rewrite(h)
    assert found.shape == (STAGES - 1, IMAGES)
    for k, b in product(range(STAGES - 1), range(IMAGES)):
        assert found[k, b].item() == pytest.approx(mean_square(h[k + 1, b], h[k, b]))


def test_direction_is_the_cosine_to_the_way_that_remains():
    h = outputs()
    found = direction(h)
    assert found.shape == (STAGES - 2, IMAGES)
    for k, b in product(range(STAGES - 2), range(IMAGES)):
        expected = cosine(h[k + 1, b] - h[k, b], h[-1, b] - h[k, b])
        assert found[k, b].item() == pytest.approx(expected)


def test_stages_that_move_straight_have_direction_one():
    start, end = outputs()[:2]
    shares = torch.tensor([0.0, 0.2, 0.9, 1.0]).view(STAGES, 1, 1, 1, 1)
    torch.testing.assert_close(
        direction(start + shares * (end - start)),
        torch.ones(STAGES - 2, IMAGES, dtype=torch.float64),
    )


def test_stages_that_move_away_have_direction_minus_one():
    h = torch.tensor([0.0, -1.0, -2.0, 3.0]).view(STAGES, 1, 1, 1, 1).expand(-1, IMAGES, 1, 2, 2)
    torch.testing.assert_close(direction(h), torch.full((STAGES - 2, IMAGES), -1.0))


def test_equal_stages_disagree_in_nothing():
    same = outputs()[:1].expand(STAGES, -1, -1, -1, -1)
    assert not discrepancy(same).any()
    assert not rewrite(same).any()


def test_figures_bear_the_number_of_their_stage():
    h = outputs()
    figures = alignment_figures(h)
    assert list(figures) == [
        "discrepancy_1",
        "discrepancy_2",
        "discrepancy_3",
        "rewrite_1",
        "rewrite_2",
        "rewrite_3",
        "direction_1",
        "direction_2",
    ]
    for name, measure in (("discrepancy", discrepancy), ("rewrite", rewrite)):
        for stage in (1, 2, 3):
            assert torch.equal(figures[f"{name}_{stage}"], measure(h)[stage - 1])
    for stage in (1, 2):
        assert torch.equal(figures[f"direction_{stage}"], direction(h)[stage - 1])
