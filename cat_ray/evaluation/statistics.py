"""From finished ranges to the numbers: moments, scores, and the hash of the images."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import safetensors.numpy

from cat_ray.evaluation.distance import Moments, frechet_distance
from cat_ray.evaluation.features import LOGITS, POOLED, SPATIAL
from cat_ray.evaluation.inception_score import SPLIT_IMAGES, ClassSums, inception_score
from cat_ray.evaluation.moments import FeatureSums
from cat_ray.evaluation.ranges import FIGURE, KEPT_RANGES, RANGE_IMAGES, STATISTICS, RangeStore
from cat_ray.evaluation.result import FRECHET

MEAN, COVARIANCE = ".mean", ".covariance"


@dataclass(frozen=True)
class Statistics:
    """What is known of a set of images.

    Attributes:
        pixels_sha256: of all ranges' hashes, in order: equal sets of images have equal ones.
        moments: of the pooled features, and of the spatial ones where there are any, by name.
        score: the Inception score, where there are logits.
        figures: means of what was measured of each image while it was made.
    """

    pixels_sha256: str
    moments: Mapping[str, Moments]
    score: float | None
    figures: Mapping[str, float]


def statistics_of(store: RangeStore) -> Statistics:
    """Reads all ranges, one after the other, in the order of their numbers.

    Raises:
        BadInput: a range can't be read, or holds features that are no finite numbers.
    """
    digest = hashlib.sha256()
    sums: dict[str, FeatureSums] = {}
    classes: list[ClassSums] = []
    totals: dict[str, float] = defaultdict(float)
    for numbers in store.ranges():
        features, pixels_sha256 = store.read(numbers)
        digest.update(pixels_sha256.encode())
        for name in [name for name in (POOLED, SPATIAL) if name in features]:
            own = FeatureSums.of(features[name].numpy(), numbers.start)
            sums[name] = sums[name].merged(own) if name in sums else own
        if LOGITS in features:
            classes.append(ClassSums.of(features[LOGITS].numpy()))
        for name in sorted(features):
            if name.startswith(FIGURE):
                totals[name.removeprefix(FIGURE)] += float(features[name].double().sum())
    together = SPLIT_IMAGES // RANGE_IMAGES
    splits = [
        reduce(ClassSums.merged, classes[begin : begin + together])
        for begin in range(0, len(classes), together)
    ]
    return Statistics(
        pixels_sha256=digest.hexdigest(),
        moments={name: own.moments() for name, own in sums.items()},
        score=inception_score(splits) if splits else None,
        figures={name: total / store.count for name, total in totals.items()},
    )


def real_moments(store: RangeStore) -> dict[str, Moments]:
    """The moments of real images, kept from one measurement to the next.

    With them all ranges but the first go: a million images' features are 20 GB.

    Raises:
        BadInput: as `statistics_of`.
    """
    place = store.folder / STATISTICS
    if place.exists():
        arrays = safetensors.numpy.load(place.read())
        names = {name.partition(".")[0] for name in arrays}
        return {name: Moments(arrays[name + MEAN], arrays[name + COVARIANCE]) for name in names}
    found = dict(statistics_of(store).moments)
    arrays = {name + MEAN: own.mean for name, own in found.items()}
    arrays |= {name + COVARIANCE: own.covariance for name, own in found.items()}
    place.write(safetensors.numpy.save(arrays))
    for numbers in store.ranges()[KEPT_RANGES:]:
        store.place(numbers).delete()
    return found


def pooled_features(store: RangeStore, ranges: int | None = None) -> np.ndarray:
    """The pooled features of all images, `[N, d]` float64, or of the first so many ranges."""
    parts = [store.read(numbers)[0][POOLED].numpy() for numbers in store.ranges()[:ranges]]
    return np.concatenate(parts).astype(np.float64)


def distances(samples: Statistics, reals: Mapping[str, Moments]) -> dict[str, float]:
    """Frechet distances of the samples to real images' moments: `frechet`, and `spatial_frechet`
    where both have spatial features; beside them all figures of the samples alone."""
    found = {FRECHET: frechet_distance(samples.moments[POOLED], reals[POOLED])}
    if SPATIAL in samples.moments.keys() & reals.keys():
        found["spatial_frechet"] = frechet_distance(samples.moments[SPATIAL], reals[SPATIAL])
    if samples.score is not None:
        found["inception_score"] = samples.score
    found |= samples.figures
    assert all(np.isfinite(value) for value in found.values())
    return found
