"""The Inception network that the Frechet Inception distance is defined on, in PyTorch.

It is the graph `classify_image` of 5 December 2015 (Szegedy et al., arXiv:1512.00567), with what
sets it apart from torchvision's: average pools that leave the padding out, a maximum pool in the
last block, and TensorFlow 1's resizing to 299 pixels, which aligns corners of pixels instead of
their centres. Weights have the names of torch-fidelity's conversion of that graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from cat_ray.errors import BadInput
from cat_ray.pretrained import read_weights

SIDE = 299
POOLED_WIDTH, CLASSES = 2048, 1008
# ADM's sFID takes seven channels of a map of 17 x 17.
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17


@dataclass(frozen=True)
class InceptionFeatures:
    """What the metrics need of some images.

    Attributes:
        pooled: the last average pool, for FID, precision and recall, `[N, 2048]`.
        spatial: `mixed_6/conv`, its first seven channels, flat in the order height, width, channel,
            for sFID, `[N, 2023]`.
        logits: class scores without the bias, for the Inception score, `[N, 1008]`.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class Inception(nn.Module):
    """The network; its parameters are frozen, its batch norms in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = Block35(192, pool_width=32)
        self.Mixed_5c = Block35(256, pool_width=64)
        self.Mixed_5d = Block35(288, pool_width=64)
        self.Mixed_6a = To17(288)
        self.Mixed_6b = Block17(128)
        self.Mixed_6c = Block17(160)
        self.Mixed_6d = Block17(160)
        self.Mixed_6e = Block17(192)
        self.Mixed_7a = To8(768)
        self.Mixed_7b = Block8(1280, pool=_average)
        self.Mixed_7c = Block8(2048, pool=_maximum)
        self.fc = nn.Linear(POOLED_WIDTH, CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> InceptionFeatures:
        """Features of RGB images `[N, 3, H, W]` uint8, in the precision of the weights."""
        x = (resize(images.to(self.fc.weight.dtype), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pooled = x.mean(dim=(2, 3))
        return InceptionFeatures(
            pooled, spatial.permute(0, 2, 3, 1).flatten(1), pooled @ self.fc.weight.T
        )


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        width_in: int,
        width: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _wide(width_in: int, width: int, length: int) -> Convolution:
    return Convolution(width_in, width, (1, length), padding=(0, length // 2))


def _high(width_in: int, width: int, length: int) -> Convolution:
    return Convolution(width_in, width, (length, 1), padding=(length // 2, 0))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class Block35(nn.Module):
    """The blocks at 35 x 35."""

    def __init__(self, width: int, pool_width: int):
        super().__init__()
        self.branch1x1 = Convolution(width, 64, 1)
        self.branch5x5_1 = Convolution(width, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(width, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(width, pool_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, twice, self.branch_pool(_average(x))], dim=1)


class To17(nn.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, width: int):
        super().__init__()
        self.branch3x3 = Convolution(width, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(width, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice, F.max_pool2d(x, 3, stride=2)], dim=1)


class Block17(nn.Module):
    """The blocks at 17 x 17; their inner width differs."""

    def __init__(self, inner: int, width: int = 768):
        super().__init__()
        self.branch1x1 = Convolution(width, 192, 1)
        self.branch7x7_1 = Convolution(width, inner, 1)
        self.branch7x7_2 = _wide(inner, inner, 7)
        self.branch7x7_3 = _high(inner, 192, 7)
        self.branch7x7dbl_1 = Convolution(width, inner, 1)
        self.branch7x7dbl_2 = _high(inner, inner, 7)
        self.branch7x7dbl_3 = _wide(inner, inner, 7)
        self.branch7x7dbl_4 = _high(inner, inner, 7)
        self.branch7x7dbl_5 = _wide(inner, 192, 7)
        self.branch_pool = Convolution(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(_average(x))], dim=1)


class To8(nn.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self, width: int):
        super().__init__()
        self.branch3x3_1 = Convolution(width, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(width, 192, 1)
        self.branch7x7x3_2 = _wide(192, 192, 7)
        self.branch7x7x3_3 = _high(192, 192, 7)
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, stride=2)], dim=1)


class Block8(nn.Module):
    """The blocks at 8 x 8; the graph pools in one by the average, in the other by the maximum."""

    def __init__(self, width: int, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Convolution(width, 320, 1)
        self.branch3x3_1 = Convolution(width, 384, 1)
        self.branch3x3_2a = _wide(384, 384, 3)
        self.branch3x3_2b = _high(384, 384, 3)
        self.branch3x3dbl_1 = Convolution(width, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _wide(384, 384, 3)
        self.branch3x3dbl_3b = _high(384, 384, 3)
        self.branch_pool = Convolution(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(twice),
                self.branch3x3dbl_3b(twice),
                self.branch_pool(self.pool(x)),
            ],
            dim=1,
        )


def resize(images: Tensor, side: int) -> Tensor:
    """Bilinear, as TensorFlow 1 does it: pixel i of the result lies at i times the scale.

    `[N, c, H, W]` floating point to `[N, c, side, side]`.
    """
    top, bottom, down = _between(images.shape[2], side, images)
    left, right, across = _between(images.shape[3], side, images)
    upper, lower = images[:, :, top], images[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return upper + (lower - upper) * down[:, None]


def _between(size: int, wanted: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each wanted place its two neighbours, and how far it lies from the first to the second."""
    # The scale is single precision there, whatever is computed with it.
    scale = torch.tensor(size / wanted, dtype=torch.float32, device=like.device)
    places = torch.arange(wanted, dtype=like.dtype, device=like.device) * scale
    before = places.long()
    return before, (before + 1).clamp_max(size - 1), places - before


def load_inception(weights: str, sha256: str) -> Inception:
    """The network with the weights of a local safetensors file.

    Args:
        weights: the file.
        sha256: of the file, in full: other weights are another measure.

    Raises:
        BadInput: there is no such file, it has another hash, or holds other weights.
    """
    content = read_weights(weights, sha256)
    network = Inception()
    try:
        network.load_state_dict(safetensors.torch.load(content))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{weights} holds no weights of Inception: {reason}") from error
    return network
