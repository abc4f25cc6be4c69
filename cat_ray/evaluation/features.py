"""Images to the features that a distance is taken on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cat_ray.evaluation.inception import load_inception
from cat_ray.evaluation.sampling import to_unit
from cat_ray.objective.alignment import load_teacher
from cat_ray.pretrained import read_weights

FEATURES_BATCH = 50
# The offline features: an image's means over a grid of squares.
PIXELS_SIDE = 8
# As `InceptionFeatures` has them; the others have the first only.
POOLED, SPATIAL, LOGITS = "pooled", "spatial", "logits"
DINOV2_FILE, DINOV2_GRID = "model.safetensors", 16

MakeFeatures = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Featuriser:
    """Which features, so that another process can load what makes them.

    Attributes:
        network: `inception`, `dinov2` or `pixels`.
        weights: Inception's file, or the folder of a DINOv2.
        sha256: of that file, or of the one of weights in the folder.
    """

    network: Literal["inception", "dinov2", "pixels"]
    weights: str | None = None
    sha256: str | None = None

    def check(self) -> None:
        """Makes sure that the weights are there, and are those that were meant.

        Raises:
            BadInput: they are not.
        """
        if self.network != "pixels":
            read_weights(self._file(), self.sha256 or "")

    def _file(self) -> str:
        folder = self.network == "dinov2"
        return f"{self.weights}/{DINOV2_FILE}" if folder else self.weights or ""

    def load(self, device: torch.device) -> MakeFeatures:
        """Images `[N, c, H, W]` uint8 to features by name, `[N, d]` float32 on the CPU.

        They are `pooled`, and of Inception `spatial` and `logits` as well.

        Raises:
            BadInput: the weights aren't those that were meant.
        """
        if self.network == "pixels":
            return _in_batches(lambda images: {POOLED: grid_means(images)}, device)
        weights, sha256 = self.weights or "", self.sha256 or ""
        if self.network == "dinov2":
            self.check()
            teacher = load_teacher(weights).to(device)
            # The class token after the last norm, of pixels brought to 224 (Stein et al., 2023).
            return _in_batches(
                lambda images: {POOLED: teacher(to_unit(images), DINOV2_GRID)[:, 0]}, device
            )
        network = load_inception(weights, sha256).to(device)
        return _in_batches(lambda images: vars(network(images.expand(-1, 3, -1, -1))), device)


def grid_means(images: Tensor) -> Tensor:
    """Means over a grid of 8 x 8 squares, in [0, 1]: `[N, c, H, W]` uint8 to `[N, 64 c]`."""
    return F.adaptive_avg_pool2d(images.double() / 255, PIXELS_SIDE).flatten(1).float()


def _in_batches(network: MakeFeatures, device: torch.device) -> MakeFeatures:
    @torch.no_grad()
    def features(images: Tensor) -> dict[str, Tensor]:
        parts = [network(part.to(device)) for part in images.split(FEATURES_BATCH)]
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    return features
