"""The multi-stage transformer generator (GAT code; modulation and heads as counted for CAT).

Shapes: B images, K stages, N tokens, C width, c image channels, R resolution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cat_ray.model.layers import (
    Attention,
    EqualLinear,
    SwiGLU,
    linear,
    position_table,
    precision,
    rms_norm,
    rotary_table,
    unpatchify,
)
from cat_ray.model.sizes import Size

CLASS_INIT_STD = 0.02
MODULATION_GAIN = 0.1


@dataclass(frozen=True)
class GeneratorShape:
    """Everything that fixes the generator's parameters and its tokens' positions."""

    size: Size
    patch: int
    resolution: int
    channels: int
    num_classes: int
    stages: int = 4
    latent_width: int = 64
    mapping_lr_multiplier: float = 0.01
    position_grid: int | None = None
    activation_checkpointing: bool = False
    autocast_dtype: torch.dtype | None = None


def unit_moment(v: Tensor) -> Tensor:
    """Scales each row to a mean square of one."""
    return v * torch.rsqrt(v.square().mean(dim=-1, keepdim=True) + 1e-8)


class MappingNetwork(nn.Module):
    """Latent `z [B, latent_width]` and class `[B]` to style `w [B, C]`."""

    def __init__(self, latent_width: int, num_classes: int, width: int, lr_multiplier: float):
        super().__init__()
        self.classes = nn.Embedding(num_classes, latent_width)
        nn.init.normal_(self.classes.weight, std=CLASS_INIT_STD)
        self.first = EqualLinear(2 * latent_width, width, lr_multiplier)
        self.second = EqualLinear(width, width, lr_multiplier)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        joint = torch.cat([unit_moment(z), unit_moment(self.classes(labels))], dim=1)
        return self.second(F.silu(self.first(joint)))


class StyleBlock(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the style."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = SwiGLU(width)
        self.modulation = linear(width, 6 * width, gain=MODULATION_GAIN)

    def forward(self, x: Tensor, style: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(style).unsqueeze(1).chunk(6, dim=-1)
        )
        x = x + gate1 * self.attention(rms_norm(x) * (1 + scale1) + shift1, rotary)
        return x + gate2 * self.feed_forward(rms_norm(x) * (1 + scale2) + shift2)


class StageHead(nn.Module):
    """Tokens `[B, N, C]` to the image `[B, c, R, R]` that a stage adds to the running output."""

    def __init__(self, width: int, patch: int, channels: int):
        super().__init__()
        self.patch = patch
        self.modulation = linear(width, 2 * width, gain=MODULATION_GAIN)
        self.output = linear(width, patch * patch * channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        shift, scale = self.modulation(style).unsqueeze(1).chunk(2, dim=-1)
        return unpatchify(self.output(rms_norm(x) * (1 + scale) + shift).float(), self.patch)


class Generator(nn.Module):
    """One forward pass from latent and class to the K accumulated stage outputs."""

    positions: Tensor
    cosines: Tensor
    sines: Tensor

    def __init__(self, shape: GeneratorShape):
        super().__init__()
        self.shape = shape
        size, grid = shape.size, shape.resolution // shape.patch
        self.mapping = MappingNetwork(
            shape.latent_width, shape.num_classes, size.width, shape.mapping_lr_multiplier
        )
        self.blocks = nn.ModuleList(StyleBlock(size.width, size.heads) for _ in range(size.depth))
        self.heads = nn.ModuleList(
            StageHead(size.width, shape.patch, shape.channels) for _ in range(shape.stages)
        )
        spacing = (shape.position_grid or grid) / grid
        positions = position_table(grid, size.width, spacing)
        self.register_buffer("positions", positions, persistent=False)
        cosines, sines = rotary_table(grid, size.width // size.heads, spacing)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """`z [B, latent_width]` and `labels [B]` to outputs h_1..h_K, `[K, B, c, R, R]` in fp32."""
        return self.synthesis(self.mapped(z, labels))

    def mapped(self, z: Tensor, labels: Tensor) -> Tensor:
        """`z [B, latent_width]` and `labels [B]` to styles `w [B, C]` in fp32."""
        # The mapping network's stored weights are large and move slowly: it stays in fp32.
        with precision(z.device, None):
            return self.mapping(z, labels)

    def synthesis(self, w: Tensor) -> Tensor:
        """Styles `w [B, C]` to outputs h_1..h_K, `[K, B, c, R, R]` in fp32."""
        with precision(w.device, self.shape.autocast_dtype):
            return self._stages(F.silu(w))

    def _stages(self, style: Tensor) -> Tensor:
        # Not len(): to torch.export that is the number of the example, for every batch.
        x = self.positions.expand(style.shape[0], -1, -1)
        rotary = (self.cosines, self.sines)
        per_stage = len(self.blocks) // len(self.heads)
        outputs: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if self.shape.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, style, rotary, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, style, rotary)
            if (index + 1) % per_stage == 0:
                residual = self.heads[len(outputs)](x, style)
                outputs.append(outputs[-1] + residual if outputs else residual)
        return torch.stack(outputs)
