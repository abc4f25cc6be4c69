"""The Inception score as ADM computes it: splits of 5,000 images in the order of their index."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPLIT_IMAGES = 5000


@dataclass(frozen=True)
class ClassSums:
    """What the score needs of some images.

    Attributes:
        count: how many images.
        probabilities: the sum of their class probabilities, `[classes]` float64.
        negative_entropy: the sum over images and classes of p log p.
    """

    count: int
    probabilities: np.ndarray
    negative_entropy: float

    @classmethod
    def of(cls, logits: np.ndarray) -> "ClassSums":
        """Of class scores `[N, classes]`."""
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(axis=1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        probabilities = np.exp(logs)
        return cls(len(logits), probabilities.sum(axis=0), float((probabilities * logs).sum()))

    def merged(self, other: "ClassSums") -> "ClassSums":
        """Of both together."""
        return ClassSums(
            self.count + other.count,
            self.probabilities + other.probabilities,
            self.negative_entropy + other.negative_entropy,
        )

    def score(self) -> float:
        """exp of the mean divergence of an image's classes from those of all (Salimans et al.)."""
        marginal = self.probabilities / self.count
        present = marginal[marginal > 0]
        return float(np.exp(self.negative_entropy / self.count - (present * np.log(present)).sum()))


def inception_score(splits: Sequence[ClassSums]) -> float:
    """The mean of the scores of the splits."""
    return float(np.mean([split.score() for split in splits]))
