"""What the discriminator sees: each stage at its own scale, real images at all of them.

Downsampling is average pooling, for reals and fakes alike: plain bilinear sampling would only read
the middle of each block.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def pool(images: Tensor, side: int) -> Tensor:
    """`[B, c, R, R]` averaged over blocks to `[B, c, side, side]`."""
    return F.avg_pool2d(images, images.shape[-1] // side)


def real_pyramid(images: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Images `[B, c, R, R]` at every scale, coarse to fine."""
    return [pool(images, side) for side in scales]


def stage_pyramid(outputs: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Stage outputs `[K, B, c, R, R]`, stage k at scale k, coarse to fine."""
    return [pool(output, side) for output, side in zip(outputs, scales, strict=True)]
