"""Samples by index: each picture is a function of (seed, index), whoever makes it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cat_ray.training.randomness import Purpose, random_stream

SAMPLING_BATCH = 256


def latents(seed: int, indices: Sequence[int], width: int) -> Tensor:
    """The latents of some samples, `[len(indices), width]`."""
    draws = [
        random_stream(seed, Purpose.SAMPLE_LATENT, index).standard_normal(width, dtype=np.float32)
        for index in indices
    ]
    return torch.from_numpy(np.stack(draws))


@torch.no_grad()
def sample_stages(network: nn.Module, z: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    """All stage outputs, `[K, N, c, R, R]` on the CPU, made in batches of fixed size."""
    parts = [
        network(part.to(device), classes.to(device)).cpu()
        for part, classes in zip(z.split(SAMPLING_BATCH), labels.split(SAMPLING_BATCH), strict=True)
    ]
    return torch.cat(parts, dim=1)


def to_pixels(images: Tensor) -> Tensor:
    """Images `[..., c, R, R]` in [-1, 1] to uint8, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 images to [-1, 1]."""
    return pixels.float() / 127.5 - 1.0
