"""Precision and recall of Kynkaanniemi et al. (arXiv:1904.06991), as ADM computes them.

A set of features is the union of balls, each round a feature and as large as the distance to its
third neighbour in the set. Precision is the share of samples inside the reals' balls, recall that
of reals inside the samples'.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cat_ray.evaluation.measurement import NEIGHBOURS

# Rows of distances that are in memory at a time.
ROWS = 1000


@dataclass(frozen=True)
class Balls:
    """Features `[N, d]`, and the radius of the ball round each, `[N]`; in double precision, so that
    close to an edge rounding doesn't decide.
    """

    centres: Tensor
    radii: Tensor

    @classmethod
    def round(cls, features: Tensor) -> "Balls":
        """The balls of a set, which has more than three members."""
        radii = [reach(rows, features) for rows in features.split(ROWS)]
        return cls(features, torch.cat(radii))

    def share_inside(self, features: Tensor) -> float:
        """The share of features `[M, d]` that lie in one of the balls, or on its edge."""
        return float(torch.cat([self.hold(rows) for rows in features.split(ROWS)]).double().mean())

    def hold(self, rows: Tensor) -> Tensor:
        """Whether each of some features `[n, d]` lies in one of the balls, `[n]`."""
        return (torch.cdist(rows, self.centres) <= self.radii).any(dim=1)


def reach(rows: Tensor, features: Tensor) -> Tensor:
    """The distance of some of a set's features `[n, d]` to their third neighbour, `[n]`."""
    # The nearest one is the feature itself.
    nearest = torch.cdist(rows, features).topk(NEIGHBOURS + 1, dim=1, largest=False)
    return nearest.values[:, -1]
