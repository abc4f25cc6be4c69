"""What the objective is set by, without tensors: jobs are read without PyTorch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AugmentPolicy:
    """Which augmentations, and how strong.

    Attributes:
        color: probability of each of brightness, saturation and contrast, for each image.
        translation: largest shift as a share of the side.
        cutout: side of the blanked square as a share of the side; 0 is off.
        flip: probability of a horizontal flip.
    """

    color: float = 0.5
    translation: float = 0.125
    cutout: float = 0.5
    flip: float = 0.4


def default_stage_weights(stages: int) -> tuple[float, ...]:
    """1 / (K - k) for k = 1..K-1: divides by how many residuals the distance spans."""
    return tuple(1.0 / (stages - stage) for stage in range(1, stages))
