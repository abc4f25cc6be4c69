"""The offline protocol on the real digits: it is content with them and sees a collapse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.data.carried import mnist
from cat_ray.evaluation.classifier import (
    Reference,
    coverage,
    fit_reference,
    measure,
    within_class_spread,
)
from cat_ray.evaluation.precision_recall import NEIGHBOURS

IMAGES, SAMPLES = 3500, 300


@pytest.fixture(scope="module")
def reference() -> Reference:
    images, labels = mnist()
    chosen = np.random.default_rng(0).permutation(len(labels))[:IMAGES]
    pixels = images[chosen].reshape(IMAGES, -1).astype(np.float32) / 127.5 - 1
    return fit_reference(pixels, labels[chosen])


@pytest.fixture(scope="module")
def of_reals(reference: Reference) -> dict[str, float]:
    # Neither those that the classifier was fitted to nor those that they are compared with.
    others = slice(SAMPLES, 2 * SAMPLES)
    return measure(reference, reference.pixels[others], reference.labels[others])


@pytest.fixture(scope="module")
def of_collapsed(reference: Reference) -> dict[str, float]:
    """Figures of one image of each class, repeated."""
    labels = np.arange(10).repeat(SAMPLES // 10)
    firsts = [reference.pixels[np.flatnonzero(reference.labels == c)[0]] for c in range(10)]
    return measure(reference, np.stack(firsts)[labels], labels)


def test_the_classifier_knows_digits_that_it_was_not_fitted_to(reference, of_reals):
    assert reference.held_out_accuracy >= 0.95
    assert of_reals["held_out_accuracy"] == reference.held_out_accuracy


def test_the_held_out_fifth_takes_no_part_in_fitting(reference):
    support = reference.classifier.support_
    fitted = reference.pixels[IMAGES // 5 :]
    np.testing.assert_array_equal(reference.classifier.support_vectors_, fitted[support])
    assert reference.classifier.shape_fit_ == fitted.shape
    # It has learnt the fitted ones by heart: judged on those it would be beyond doubt.
    assert reference.held_out_accuracy < 0.99
    assert reference.classifier.score(fitted[:100], reference.labels[IMAGES // 5 :][:100]) == 1


def test_real_digits_pass(of_reals):
    assert of_reals["class_accuracy"] > 0.92
    assert of_reals["within_class_spread"] == pytest.approx(1, abs=0.1)
    assert all(of_reals[name] > 0.8 for name in ("recall", "precision", "recall_pixels"))


def test_digits_of_other_classes_than_asked_for_are_counted(reference):
    labels = reference.labels[:100].copy()
    labels[:40] = (labels[:40] + 1) % 10
    figures = measure(reference, reference.pixels[:100], labels)
    assert 0.5 < figures["class_accuracy"] <= 0.62


def test_a_collapse_is_seen_though_every_sample_is_a_good_digit(of_collapsed, of_reals):
    assert of_collapsed["class_accuracy"] >= 0.9
    assert of_collapsed["precision"] > 0.9
    assert of_collapsed["within_class_spread"] < 0.01
    assert of_collapsed["recall"] < 0.1
    assert of_collapsed["recall_pixels"] < 0.1
    assert of_collapsed["frechet_pixel_pca"] > 10 * of_reals["frechet_pixel_pca"]


def test_noise_is_of_no_class_and_far_away(reference, of_reals):
    noise = np.random.default_rng(1).uniform(-1, 1, (100, 1024)).astype(np.float32)
    figures = measure(reference, noise, np.arange(100) % 10)
    assert figures["class_accuracy"] < 0.3
    assert figures["recall"] < 0.1
    assert figures["recall_pixels"] < 0.1
    assert figures["frechet_pixel_pca"] > 10 * of_reals["frechet_pixel_pca"]


def test_all_reals_are_at_no_frechet_distance_from_themselves(reference):
    small = fit_reference(reference.pixels[:300], reference.labels[:300])
    figures = measure(small, small.pixels, small.labels)
    assert figures["frechet_pixel_pca"] == pytest.approx(0, abs=1e-3)
    assert figures["within_class_spread"] == pytest.approx(1)


def test_the_components_are_the_directions_of_most_variance(reference):
    directions = reference.components
    assert directions.shape == (1024, 64)
    np.testing.assert_allclose(directions.T @ directions, np.eye(64), atol=1e-4)
    kept = (reference.pixels @ directions).var(axis=0)
    assert (np.diff(kept) <= 1e-3 * kept[0]).all()
    assert kept.sum() > 0.8 * reference.pixels.var(axis=0).sum()


def test_spread_is_taken_within_a_class_and_not_between_classes():
    pixels = np.array([[0.0, 10], [2, 10], [100, 0], [100, 8]])
    assert within_class_spread(pixels, np.array([0, 0, 1, 1])) == pytest.approx((1 + 0 + 0 + 4) / 4)
    assert within_class_spread(pixels, np.array([0, 1, 2, 3])) == 0


def by_hand(points: np.ndarray, manifold: np.ndarray) -> float:
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(np.square(a - b).sum()))

    inside = 0
    for point in points:
        for centre_at, centre in enumerate(manifold):
            others = [distance(centre, o) for at, o in enumerate(manifold) if at != centre_at]
            if distance(point, centre) <= sorted(others)[NEIGHBOURS - 1]:
                inside += 1
                break
    return inside / len(points)


coordinates = st.tuples(st.integers(-9, 9), st.integers(-9, 9))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(coordinates, min_size=1, max_size=8), st.lists(coordinates, min_size=4, max_size=8))
def test_coverage_is_the_share_inside_a_ball_to_the_third_neighbour(points, manifold):
    found = coverage(np.asarray(points, np.float64), np.asarray(manifold, np.float64))
    assert found == pytest.approx(by_hand(np.asarray(points), np.asarray(manifold)))


def test_coverage_of_many_points_is_that_of_the_loops():
    numbers = np.random.default_rng(0)
    points, manifold = numbers.normal(size=(60, 3)), 0.5 * numbers.normal(size=(40, 3))
    expected = by_hand(points, manifold)
    assert 0.2 < expected < 0.8
    assert coverage(points, manifold) == pytest.approx(expected)


def test_recall_asks_for_all_reals_and_precision_for_all_samples():
    numbers = np.random.default_rng(0)
    two_modes = np.concatenate([numbers.normal(size=(20, 2)), numbers.normal(30, 1, size=(20, 2))])
    one_mode = numbers.normal(scale=0.5, size=(40, 2))
    assert coverage(two_modes, one_mode) <= 0.5
    assert coverage(one_mode, two_modes) > 0.9
