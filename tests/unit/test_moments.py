"""Moments of parts are those of the whole, bit for bit whoever summed up which part."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.errors import BadInput
from cat_ray.evaluation.moments import FeatureSums

some = settings(max_examples=60, deadline=None, derandomize=True)


def features(count: int, width: int = 4, seed: int = 0) -> np.ndarray:
    numbers = np.random.default_rng(seed)
    mix = numbers.normal(size=(width, width))
    return (numbers.normal(size=(count, width)) @ mix + 100).astype(np.float32)


@some
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8).filter(lambda cuts: sum(cuts) > 1))
def test_parts_of_any_size_give_the_moments_of_all(counts):
    whole = features(sum(counts)).astype(np.float64)
    parts = np.split(whole, np.cumsum(counts)[:-1])
    sums = FeatureSums.of(parts[0])
    for part in parts[1:]:
        sums = sums.merged(FeatureSums.of(part))
    found = sums.moments()
    assert sums.count == len(whole)
    np.testing.assert_allclose(found.mean, whole.mean(axis=0), rtol=1e-12)
    exact = np.cov(whole, rowvar=False)
    np.testing.assert_allclose(found.covariance, exact, rtol=1e-9, atol=1e-10)
    np.testing.assert_array_equal(found.covariance, found.covariance.T)


def test_a_covariance_small_beside_the_mean_is_not_lost():
    values = features(1000) * 1e-4 + 1e4
    values = values.astype(np.float64)
    sums = FeatureSums.of(values[:300]).merged(FeatureSums.of(values[300:]))
    exact = np.cov(values - 1e4, rowvar=False)
    np.testing.assert_allclose(sums.moments().covariance, exact, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_feature_that_is_no_number_is_refused_with_its_place(value):
    broken = features(9)
    broken[[4, 7], 2] = value
    with pytest.raises(BadInput, match=r"2 of 9 images .* the first is number 4"):
        FeatureSums.of(broken)


def test_one_image_has_no_covariance():
    with pytest.raises(BadInput, match="two images at least, there are 1"):
        FeatureSums.of(features(1)).moments()
