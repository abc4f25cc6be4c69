"""The Frechet distance, against other formulas for the same number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from cat_ray.evaluation.distance import Moments, frechet_distance, moments

some = settings(max_examples=40, deadline=None, derandomize=True)
deviations = st.lists(st.floats(0, 10), min_size=3, max_size=3)
means = st.lists(st.floats(-10, 10), min_size=3, max_size=3)


def features(seed: int, count: int, width: int) -> np.ndarray:
    """Correlated features with a mean of their own."""
    numbers = np.random.default_rng(seed)
    mix = numbers.normal(size=(width, width))
    return numbers.normal(size=(count, width)) @ mix + numbers.normal(size=width)


def gaussian(mean: list[float], deviation: list[float]) -> Moments:
    return Moments(np.asarray(mean), np.diag(np.square(deviation)))


def by_matrix_root(a: Moments, b: Moments) -> float:
    root = np.real(sqrtm(a.covariance @ b.covariance))
    gap = a.mean - b.mean
    return gap @ gap + np.trace(a.covariance + b.covariance - 2 * root)


def by_nuclear_norm(x: np.ndarray, y: np.ndarray) -> float:
    """From the features: tr (A B)^(1/2) is the sum of singular values of the centred X^T Y."""
    gap = x.mean(axis=0) - y.mean(axis=0)
    x, y = ((z - z.mean(axis=0)) / np.sqrt(len(z) - 1) for z in (x, y))
    mixed = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return gap @ gap + np.square(x).sum() + np.square(y).sum() - 2 * mixed


@pytest.mark.parametrize(("width", "seed"), [(2, 0), (5, 1), (16, 2)])
def test_it_is_the_formula_with_the_matrix_root(width, seed):
    a = moments(features(seed, 50, width))
    b = moments(features(seed + 100, 70, width))
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-9)


@pytest.mark.parametrize(("count", "other"), [(3, 40), (40, 3), (5, 9), (2, 2)])
def test_fewer_samples_than_features_are_no_obstacle(count, other):
    x, y = features(0, count, 12), features(1, other, 12)
    distance = frechet_distance(moments(x), moments(y))
    # Square roots of eigenvalues that should be zero leave 1e-7 or so.
    assert distance == pytest.approx(by_nuclear_norm(x, y), rel=1e-5)


@some
@given(means, deviations, means, deviations)
def test_it_has_a_closed_form_where_the_features_are_independent(m1, s1, m2, s2):
    expected = sum((a - b) ** 2 for a, b in zip([*m1, *s1], [*m2, *s2], strict=True))
    distance = frechet_distance(gaussian(m1, s1), gaussian(m2, s2))
    assert distance == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("count", [5, 100])
def test_the_same_features_are_at_no_distance(count):
    same = moments(features(3, count, 8))
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-5)


def test_both_directions_are_equally_far():
    a, b = moments(features(0, 50, 6)), moments(features(1, 50, 6))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_a_shift_of_the_mean_adds_its_square():
    x = features(0, 50, 6)
    shift = np.arange(6.0)
    distance = frechet_distance(moments(x), moments(x + shift))
    assert distance == pytest.approx(shift @ shift, rel=1e-6)


def test_moments_are_mean_and_unbiased_covariance():
    x = features(0, 9, 3)
    found = moments(x)
    mean = [sum(x[:, i]) / 9 for i in range(3)]
    covariance = [
        [sum((x[:, i] - mean[i]) * (x[:, j] - mean[j])) / 8 for j in range(3)] for i in range(3)
    ]
    np.testing.assert_allclose(found.mean, mean)
    np.testing.assert_allclose(found.covariance, covariance)


def test_moments_of_single_precision_are_taken_in_double():
    x = (features(0, 200, 3) * 0.01 + 1000).astype(np.float32)
    found = moments(x)
    assert (found.mean.dtype, found.covariance.dtype) == (np.float64, np.float64)
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(axis=0), rtol=1e-12)
    exact = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found.covariance, exact, rtol=1e-9)
