"""CAT's consistency term: every stage's output is tied to the final one."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

StopGradient = Literal["none", "final", "intermediate"]


def consistency(
    outputs: Tensor, stage_weights: Sequence[float], stop_gradient: StopGradient = "none"
) -> Tensor:
    """Mean over k < K of w_k times the mean square of h_k - h_K, one value for each image.

    Args:
        outputs: the accumulated stage outputs h_1..h_K, `[K, B, c, R, R]`.
        stage_weights: w_1..w_{K-1}.
        stop_gradient: `none` shrinks the residuals after stage k, `final` makes the early stages
            chase a fixed final image, `intermediate` drags the final image to the early ones.

    Returns:
        `[B]`.
    """
    early, final = outputs[:-1], outputs[-1:]
    if stop_gradient == "final":
        final = final.detach()
    elif stop_gradient == "intermediate":
        early = early.detach()
    distances = (early - final).square().flatten(2).mean(dim=2)
    # Numbers, not a tensor made of them: its way to the device would be waited for.
    weighted = [weight * each for weight, each in zip(stage_weights, distances, strict=True)]
    return torch.stack(weighted).mean(dim=0)
