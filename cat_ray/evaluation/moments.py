"""Mean and covariance of features that come in parts, in double precision."""

from dataclasses import dataclass

import numpy as np

from cat_ray.errors import BadInput
from cat_ray.evaluation.distance import Moments


@dataclass(frozen=True)
class FeatureSums:
    """What is kept of some features.

    Merged in the same order, the same parts give the same bits, whoever summed which of them up.

    Attributes:
        count: how many features.
        mean: theirs, `[d]` float64.
        scatter: the sum of the outer products of their deviations from it, `[d, d]` float64.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, first: int = 0) -> "FeatureSums":
        """Of features `[N, d]`; `first` is the number of the first, for messages.

        Raises:
            BadInput: one of them is not a finite number.
        """
        values = features.astype(np.float64)
        broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(broken):
            raise BadInput(
                f"{len(broken)} of {len(values)} images have features that are no finite numbers, "
                f"the first is number {first + broken[0]}: look at the samples"
            )
        mean = values.mean(axis=0)
        deviations = values - mean
        return cls(len(values), mean, deviations.T @ deviations)

    def merged(self, other: "FeatureSums") -> "FeatureSums":
        """Of both together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = np.outer(gap, gap) * (self.count * other.count / count)
        return FeatureSums(count, mean, self.scatter + other.scatter + between)

    def moments(self) -> Moments:
        """Mean and unbiased covariance.

        Raises:
            BadInput: there are fewer than two features.
        """
        if self.count < 2:
            raise BadInput(f"a covariance needs two images at least, there are {self.count}")
        return Moments(self.mean, self.scatter / (self.count - 1))
