"""R1 and R2 by finite differences: no derivative of a derivative (GAT section 3, GAT code).

For noise eps of unit variance, E[((D(x + sigma eps) - D(x)) / sigma)^2] tends to |grad D(x)|^2
as sigma goes to zero.
"""

from typing import Literal

from torch import Tensor

Reduction = Literal["mean", "sum"]


def finite_difference(
    logits: Tensor, perturbed_logits: Tensor, sigma: float, reduction: Reduction
) -> Tensor:
    """Squared slope of the logits along the perturbation, one value for each image.

    Args:
        logits: at the images, `[B, K]`, fp32.
        perturbed_logits: at the images plus `sigma` times standard normal noise, `[B, K]`.
        sigma: size of the perturbation.
        reduction: `mean` averages the scales' squares (GAT); `sum` squares the summed scales,
            which in expectation is K times as much.

    Returns:
        `[B]`.
    """
    slopes = (logits - perturbed_logits) / sigma
    if reduction == "sum":
        return slopes.sum(dim=1).square()
    return slopes.square().mean(dim=1)
