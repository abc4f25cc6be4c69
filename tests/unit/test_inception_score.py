"""The Inception score, against its definition written out in loops."""

import math

import numpy as np
import pytest

from cat_ray.evaluation.inception_score import ClassSums, inception_score


def logits(count: int, classes: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=(count, classes)).astype(np.float32)


def by_loops(scores: np.ndarray) -> float:
    exponentials = [[math.exp(value) for value in row] for row in scores.tolist()]
    chances = [[value / sum(row) for value in row] for row in exponentials]
    overall = [sum(row[c] for row in chances) / len(chances) for c in range(len(chances[0]))]
    divergences = [
        sum(p * math.log(p / q) for p, q in zip(row, overall, strict=True)) for row in chances
    ]
    return math.exp(sum(divergences) / len(divergences))


@pytest.mark.parametrize("cuts", [[], [1], [7, 11], [20, 40]])
def test_parts_give_the_score_of_the_whole(cuts):
    whole = logits(50)
    first, *others = [ClassSums.of(part) for part in np.split(whole, cuts)]
    for other in others:
        first = first.merged(other)
    assert first.score() == pytest.approx(by_loops(whole), rel=1e-10)


def test_it_is_the_mean_over_splits():
    parts = [logits(20, seed=seed) for seed in range(3)]
    expected = sum(map(by_loops, parts)) / 3
    found = inception_score([ClassSums.of(part) for part in parts])
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # All the same: nothing is learnt from an image. Each certain of another class: all is.
        (np.zeros((8, 4)), 1.0),
        (np.eye(4) * 1000, 4.0),
        (np.eye(4)[[0, 0, 1, 1]] * 1000, 2.0),
        (np.tile(np.eye(4)[:1] * 1000, (6, 1)), 1.0),
    ],
)
def test_certainty_and_variety_are_what_counts(scores, expected):
    assert ClassSums.of(scores).score() == pytest.approx(expected, rel=1e-12)
