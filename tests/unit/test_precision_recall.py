"""Precision and recall, against their definition written out in loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cat_ray.evaluation import precision_recall
from cat_ray.evaluation.precision_recall import Balls


def points(count: int, width: int = 3, seed: int = 0, shift: float = 0.0) -> Tensor:
    values = np.random.default_rng(seed).normal(size=(count, width)) + shift
    return torch.from_numpy(values)


def by_loops(inside: Tensor, manifold: Tensor) -> float:
    """ADM's definition: in a ball that reaches the third neighbour, which the centre is not."""
    found = 0
    for point in inside.tolist():
        for at, centre in enumerate(manifold.tolist()):
            others = [
                np.linalg.norm(np.subtract(centre, other))
                for place, other in enumerate(manifold.tolist())
                if place != at
            ]
            if np.linalg.norm(np.subtract(point, centre)) <= sorted(others)[2]:
                found += 1
                break
    return found / len(inside)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0, 30.0])
@pytest.mark.parametrize(("reals", "samples"), [(20, 20), (12, 40), (40, 4)])
@pytest.mark.parametrize("rows", [5, 1000])
def test_it_is_the_definition(monkeypatch, shift, reals, samples, rows):
    monkeypatch.setattr(precision_recall, "ROWS", rows)
    real, sample = points(reals), points(samples, seed=1, shift=shift)
    assert Balls.round(real).share_inside(sample) == by_loops(sample, real)
    assert Balls.round(sample).share_inside(real) == by_loops(real, sample)


def test_a_set_is_inside_itself():
    same = points(300, width=64)
    assert Balls.round(same).share_inside(same) == 1.0


def test_one_mode_of_two_is_precise_but_recalls_half():
    modes = torch.cat([points(200), points(200, seed=1, shift=50.0)])
    samples = points(200, seed=2)
    assert Balls.round(modes).share_inside(samples) > 0.9
    assert Balls.round(samples).share_inside(modes) <= 0.5
