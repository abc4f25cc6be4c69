"""Frechet distance between Gaussians fitted to two sets of features."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Mean `[d]` and covariance `[d, d]` of features, in float64."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Mean and unbiased covariance of features `[N, d]`."""
    values = features.astype(np.float64)
    return Moments(values.mean(axis=0), np.cov(values, rowvar=False))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), by eigenvalues of the symmetric form."""
    root = _symmetric_root(a.covariance)
    product = root @ b.covariance @ root
    mixed = np.sqrt(np.linalg.eigvalsh(product).clip(min=0)).sum()
    gap = np.square(a.mean - b.mean).sum()
    return float(gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * mixed)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
