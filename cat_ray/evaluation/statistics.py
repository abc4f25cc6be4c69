"""From finished ranges to the numbers: moments, scores, and the hash of the images."""

import hashlib
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from cat_ray.evaluation.distance import Moments, frechet_distance
from cat_ray.evaluation.inception_score import SPLIT_IMAGES, ClassSums, inception_score
from cat_ray.evaluation.moments import FeatureSums
from cat_ray.evaluation.precision_recall import Balls
from cat_ray.evaluation.ranges import RANGE_IMAGES, RangeStore

# ADM compares with so many real images, for precision and recall.
MANIFOLD_IMAGES = 10_000


@dataclass(frozen=True)
class Statistics:
    """What is known of a set of images.

    Attributes:
        pixels_sha256: of all ranges' hashes, in order: equal sets of images have equal ones.
        pooled: moments of the pooled features.
        spatial: of the spatial ones, where there are any.
        score: the Inception score, where there are logits.
    """

    pixels_sha256: str
    pooled: Moments
    spatial: Moments | None
    score: float | None


def statistics_of(store: RangeStore) -> Statistics:
    """Reads all ranges, one after the other, in the order of their numbers.

    Raises:
        BadInput: a range can't be read, or holds features that are no finite numbers.
    """
    digest = hashlib.sha256()
    sums: dict[str, FeatureSums] = {}
    classes: list[ClassSums] = []
    for numbers in store.ranges():
        features, pixels_sha256 = store.read(numbers)
        digest.update(pixels_sha256.encode())
        for name in ("pooled", "spatial"):
            if name in features:
                own = FeatureSums.of(features[name].numpy())
                sums[name] = sums[name].merged(own) if name in sums else own
        if "logits" in features:
            classes.append(ClassSums.of(features["logits"].numpy()))
    together = SPLIT_IMAGES // RANGE_IMAGES
    splits = [
        reduce(ClassSums.merged, classes[begin : begin + together])
        for begin in range(0, len(classes), together)
    ]
    return Statistics(
        digest.hexdigest(),
        sums["pooled"].moments(),
        sums["spatial"].moments() if "spatial" in sums else None,
        inception_score(splits) if splits else None,
    )


def precision_and_recall(samples: RangeStore, reals: RangeStore) -> dict[str, float]:
    """ADM's: all samples against the first 10,000 real images."""
    real = _pooled(reals)[:MANIFOLD_IMAGES]
    sample = _pooled(samples)
    return {
        "precision": Balls.round(real).share_inside(sample),
        "recall": Balls.round(sample).share_inside(real),
    }


def _pooled(store: RangeStore) -> torch.Tensor:
    return torch.cat([store.read(numbers)[0]["pooled"].double() for numbers in store.ranges()])


def distances(samples: Statistics, pooled: Moments, spatial: Moments | None) -> dict[str, float]:
    """Frechet distances of the samples to real images' moments: `frechet`, and `spatial_frechet`
    where both have spatial features."""
    found = {"frechet": frechet_distance(samples.pooled, pooled)}
    if samples.spatial is not None and spatial is not None:
        found["spatial_frechet"] = frechet_distance(samples.spatial, spatial)
    if samples.score is not None:
        found["inception_score"] = samples.score
    assert all(np.isfinite(value) for value in found.values())
    return found
