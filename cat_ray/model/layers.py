"""Transformer layers shared by the generator and the discriminator.

Shapes: B images, N tokens, C width, H heads, D = C / H head width.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_THETA = 10_000.0
NORM_EPSILON = 1e-6
# A GPU's matrix units read rows of 16 bytes, eight numbers of bf16, at once.
ALIGNMENT = 8


def precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to `dtype` on this device, or plain fp32 arithmetic when it is None."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def rms_norm(x: Tensor) -> Tensor:
    """Root-mean-square normalisation over the last axis, without a learned gain."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPSILON)


def linear(inputs: int, outputs: int, gain: float = 1.0, bias: bool = True) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    _initialise(layer, gain)
    return layer


def _initialise(layer: nn.Linear, gain: float = 1.0) -> None:
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class EqualLinear(nn.Module):
    """A linear layer whose stored parameters are `1 / lr_multiplier` times those it uses.

    An Adam step of a given size thus moves the used weights `lr_multiplier` times as far.
    """

    def __init__(self, inputs: int, outputs: int, lr_multiplier: float):
        super().__init__()
        self.lr_multiplier = lr_multiplier
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight, gain=1.0 / lr_multiplier)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.lr_multiplier, self.bias * self.lr_multiplier)


def token_places(grid: int, spacing: float = 1.0) -> Tensor:
    """Where the tokens of a grid stand on each axis, `[grid]` in fp64.

    Token i stands at (i + 1/2) * spacing - 1/2: with a spacing of 1 at the integers 0..grid-1, and
    with a smaller one at the centre of its part of a coarser grid's tokens, which stand at those.
    """
    return (torch.arange(grid, dtype=torch.float64) + 0.5) * spacing - 0.5


def position_table(grid: int, width: int, spacing: float = 1.0) -> Tensor:
    """Fixed two-dimensional sine and cosine positions, `[grid * grid, width]`.

    The first half of the width encodes the row, the second half the column; `spacing` is that of
    `token_places`.
    """
    quarter = width // 4
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = token_places(grid, spacing)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None].expand(grid, grid, 2 * quarter)
    columns = axis[None, :].expand(grid, grid, 2 * quarter)
    return torch.cat([rows, columns], dim=2).reshape(grid * grid, width).float()


def rotary_table(grid: int, head_width: int, spacing: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of two-dimensional rotary positions, each `[grid * grid, head_width / 2]`.

    Half of the head turns with the row, half with the column; `spacing` is that of `token_places`.
    """
    quarter = head_width // 4
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    axis = token_places(grid, spacing)[:, None] * frequencies
    rows = axis[:, None].expand(grid, grid, quarter)
    columns = axis[None, :].expand(grid, grid, quarter)
    angles = torch.cat([rows, columns], dim=2).reshape(grid * grid, 2 * quarter)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turns adjacent pairs of the last axis of `x [B, H, N, D]` by the angles of each token."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], dim=-1)
    return turned.flatten(-2).type_as(x)


class Attention(nn.Module):
    """Self-attention with per-head normalised queries and keys and rotary positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.query_gain = nn.Parameter(torch.ones(width // heads))
        self.key_gain = nn.Parameter(torch.ones(width // heads))
        self.output = linear(width, width)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], segments: Sequence[int] | None = None
    ) -> Tensor:
        """`x [B, N, C]`; tokens attend only within their own one of the `segments` (lengths)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query = rotate(rms_norm(query) * self.query_gain, *rotary).type_as(value)
        key = rotate(rms_norm(key) * self.key_gain, *rotary).type_as(value)
        lengths = list(segments) if segments is not None else [tokens]
        parts = zip(
            query.split(lengths, dim=2),
            key.split(lengths, dim=2),
            value.split(lengths, dim=2),
            strict=True,
        )
        attended = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)
        return self.output(attended.transpose(1, 2).reshape(batch, tokens, width))


class SwiGLU(nn.Module):
    """Gated feed-forward layer with a hidden width of two thirds of four times the width.

    For the width 1280 that is 3413; it is computed with zeros beside it, up to `ALIGNMENT`.
    """

    def __init__(self, width: int):
        super().__init__()
        hidden = 8 * width // 3
        self.expand = PaddedLinear(width, 2 * hidden, padded_parts=2)
        self.contract = PaddedLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.contract(F.silu(gate) * value)


def padded(width: int) -> int:
    """The least multiple of `ALIGNMENT` that is no less."""
    return width + -width % ALIGNMENT


class PaddedLinear(nn.Linear):
    """A linear layer with Xavier-uniform weights and zero bias that computes with zeros beside it.

    Zeros may follow its inputs. Of its outputs they follow each of `padded_parts` equal parts, up
    to a multiple of `ALIGNMENT`.
    """

    def __init__(self, inputs: int, outputs: int, padded_parts: int = 0):
        super().__init__(inputs, outputs)
        self.padded_parts = padded_parts
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if beside := x.shape[-1] - self.in_features:
            weight = F.pad(weight, (0, beside))
        if parts := self.padded_parts:
            part = self.out_features // parts
            if below := padded(part) - part:
                weight = F.pad(weight.unflatten(0, (parts, part)), (0, 0, 0, below)).flatten(0, 1)
                bias = F.pad(bias.unflatten(0, (parts, part)), (0, below)).flatten()
        return F.linear(x, weight, bias)


def patchify(images: Tensor, patch: int) -> Tensor:
    """`[B, c, S, S]` to `[B, (S/patch)^2, c * patch^2]`, tokens in raster order."""
    return F.unfold(images, kernel_size=patch, stride=patch).transpose(1, 2)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """Inverse of `patchify`: `[B, N, c * patch^2]` to `[B, c, S, S]` with S = sqrt(N) * patch."""
    side = math.isqrt(tokens.shape[1]) * patch
    return F.fold(tokens.transpose(1, 2), (side, side), kernel_size=patch, stride=patch)
