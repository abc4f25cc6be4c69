"""The scale-wise transformer discriminator (CAT: each prediction sees only its own scale).

Shapes: B images, K scales, N tokens, C width, c image channels, P projection width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cat_ray.model.layers import (
    NORM_EPSILON,
    Attention,
    EqualLinear,
    SwiGLU,
    linear,
    patchify,
    position_table,
    precision,
    rotary_table,
)
from cat_ray.model.sizes import Size

TOKEN_INIT_STD = 0.02
LAYER_SCALE_INIT = 0.1

Scope = Literal["scale_wise", "aggregated"]


@dataclass(frozen=True)
class DiscriminatorShape:
    """Everything that fixes the discriminator's parameters and what its tokens may see."""

    size: Size
    patch: int
    scales: tuple[int, ...]
    channels: int
    num_classes: int
    projection_width: int = 2048
    class_lr_multiplier: float = 0.01
    scope: Scope = "scale_wise"
    teacher_width: int | None = None
    position_grid: int | None = None
    activation_checkpointing: bool = False
    autocast_dtype: torch.dtype | None = None


class Block(nn.Module):
    """Attention and feed-forward with learned norm gains and layer scales."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.attention = Attention(width, heads)
        self.attention_scale = nn.Parameter(torch.full((width,), LAYER_SCALE_INIT))
        self.feed_forward_norm = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.feed_forward = SwiGLU(width)
        self.feed_forward_scale = nn.Parameter(torch.full((width,), LAYER_SCALE_INIT))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], segments: Sequence[int]) -> Tensor:
        attended = self.attention(self.attention_norm(x), rotary, segments)
        x = x + self.attention_scale * attended
        return x + self.feed_forward_scale * self.feed_forward(self.feed_forward_norm(x))


class ClassVector(nn.Module):
    """Class `[B]` to the vector `[B, P]` that the image's feature is projected onto."""

    def __init__(self, num_classes: int, width: int, lr_multiplier: float):
        super().__init__()
        self.classes = nn.Embedding(num_classes, width)
        nn.init.normal_(self.classes.weight, std=TOKEN_INIT_STD)
        self.first = EqualLinear(width, width, lr_multiplier)
        self.second = EqualLinear(width, width, lr_multiplier)

    def forward(self, labels: Tensor) -> Tensor:
        return self.second(F.silu(self.first(self.classes(labels))))


class Discriminator(nn.Module):
    """A pyramid of images and a class to one logit for each scale."""

    positions: Tensor
    cosines: Tensor
    sines: Tensor

    def __init__(self, shape: DiscriminatorShape):
        super().__init__()
        self.shape = shape
        width, scales = shape.size.width, len(shape.scales)
        grids = [scale // shape.patch for scale in shape.scales]
        self.patch_embedding = linear(shape.channels * shape.patch**2, width)
        self.cls = nn.Parameter(TOKEN_INIT_STD * torch.randn(scales, width))
        self.scale_embedding = nn.Parameter(TOKEN_INIT_STD * torch.randn(scales, width))
        self.blocks = nn.ModuleList(Block(width, shape.size.heads) for _ in range(shape.size.depth))
        self.norm = nn.RMSNorm(width, eps=NORM_EPSILON)
        # No bias: it would cancel in every relativistic pair, and Adam would follow rounding noise.
        self.feature = linear(width, shape.projection_width, bias=False)
        self.class_vector = ClassVector(
            shape.num_classes, shape.projection_width, shape.class_lr_multiplier
        )
        self.projector: nn.Module | None = None
        if shape.teacher_width is not None:
            hidden = shape.projection_width
            self.projector = nn.Sequential(
                linear(width, hidden),
                nn.SiLU(),
                linear(hidden, hidden),
                nn.SiLU(),
                linear(hidden, shape.teacher_width),
            )

        # A scale's sequence is its CLS token and then its patches; CLS has no position.
        self.lengths = [1 + grid * grid for grid in grids]
        # Of the finest scale; in proportion, that of every scale.
        spacing = (shape.position_grid or grids[-1]) / grids[-1]
        tables = [position_table(grid, width, spacing) for grid in grids]
        positions = torch.cat([F.pad(table, (0, 0, 1, 0)) for table in tables])
        self.register_buffer("positions", positions, persistent=False)
        rotary = [rotary_table(grid, width // shape.size.heads, spacing) for grid in grids]
        cosines = torch.cat([F.pad(cosine, (0, 0, 1, 0), value=1.0) for cosine, _ in rotary])
        sines = torch.cat([F.pad(sine, (0, 0, 1, 0)) for _, sine in rotary])
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)

    def forward(
        self, pyramid: Sequence[Tensor], labels: Tensor, aligned_rows: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Judges each scale by itself.

        Args:
            pyramid: the images at each scale, coarse to fine, `[B, c, s_k, s_k]`.
            labels: classes `[B]`.
            aligned_rows: how many of the first images to project for the teacher's alignment.

        Returns:
            Logits `[B, K]` in fp32, and, when `aligned_rows` is positive, the projected tokens of
            the finest scale, `[aligned_rows, 1 + N, teacher_width]`, CLS first.
        """
        with precision(labels.device, self.shape.autocast_dtype):
            tokens = self._tokens(pyramid)
            cls_at = [sum(self.lengths[:scale]) for scale in range(len(self.lengths))]
            # Not by an index, which would be copied to the device in every pass.
            features = self.norm(torch.stack([tokens[:, at] for at in cls_at], dim=1))
            projected = None
            if aligned_rows:
                assert self.projector is not None, "the discriminator has no alignment projector"
                projected = self.projector(tokens[:aligned_rows, cls_at[-1] :]).float()
        # Differences of logits are divided by a small sigma: bf16 would drown them in rounding.
        with precision(labels.device, None):
            vectors = self.class_vector(labels)
            logits = torch.einsum("bkp,bp->bk", self.feature(features.float()), vectors)
        return logits, projected

    def _tokens(self, pyramid: Sequence[Tensor]) -> Tensor:
        """All scales' tokens after the last block, one after the other, `[B, sum(N_k + 1), C]`."""
        parts: list[Tensor] = []
        for scale, images in enumerate(pyramid):
            cls = self.cls[scale].expand(len(images), 1, -1)
            # The first layer sees the penalty's small noise: it stays in fp32.
            with precision(images.device, None):
                patches = self.patch_embedding(patchify(images, self.shape.patch))
            parts.append(torch.cat([cls, patches], dim=1) + self.scale_embedding[scale])
        x = torch.cat(parts, dim=1) + self.positions
        segments = self.lengths if self.shape.scope == "scale_wise" else [sum(self.lengths)]
        rotary = (self.cosines, self.sines)
        for block in self.blocks:
            if self.shape.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, rotary, segments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, rotary, segments)
        return x
