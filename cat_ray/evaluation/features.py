"""Images to the features that a distance is taken on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cat_ray.evaluation.inception import (
    POOLED_WIDTH,
    SPATIAL_CHANNELS,
    SPATIAL_SIDE,
    InceptionFeatures,
    load_inception,
)

FEATURES_BATCH = 50
# The offline features: an image's means over a grid of squares.
PIXELS_SIDE = 8


@dataclass(frozen=True)
class Featuriser:
    """Which features, so that another process can load what makes them.

    Attributes:
        network: `inception` or `pixels`.
        weights: Inception's file.
        sha256: of that file.
    """

    network: Literal["inception", "pixels"]
    weights: str | None = None
    sha256: str | None = None

    def widths(self, channels: int) -> tuple[int, int | None]:
        """Of the pooled features, and of the spatial ones if there are any."""
        if self.network == "pixels":
            return channels * PIXELS_SIDE**2, None
        return POOLED_WIDTH, SPATIAL_CHANNELS * SPATIAL_SIDE**2

    def load(self, device: torch.device) -> Callable[[Tensor], dict[str, Tensor]]:
        """Images `[N, c, H, W]` uint8 to features by name, `[N, d]` float32 on the CPU.

        They are `pooled`, and of Inception `spatial` and `logits` as well.

        Raises:
            BadInput: the weights aren't those that were meant.
        """
        if self.network == "pixels":
            return _in_batches(lambda images: {"pooled": grid_means(images)}, device)
        network = load_inception(self.weights or "", self.sha256 or "").to(device)

        def named(images: Tensor) -> dict[str, Tensor]:
            found: InceptionFeatures = network(images.expand(-1, 3, -1, -1))
            return vars(found)

        return _in_batches(named, device)


def grid_means(images: Tensor) -> Tensor:
    """Means over a grid of 8 x 8 squares, in [0, 1]: `[N, c, H, W]` uint8 to `[N, 64 c]`."""
    return F.adaptive_avg_pool2d(images.double() / 255, PIXELS_SIDE).flatten(1).float()


def _in_batches(
    network: Callable[[Tensor], dict[str, Tensor]], device: torch.device
) -> Callable[[Tensor], dict[str, Tensor]]:
    @torch.no_grad()
    def features(images: Tensor) -> dict[str, Tensor]:
        parts = [network(part.to(device)) for part in images.split(FEATURES_BATCH)]
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    return features
