"""Samples by index: each picture is a function of (seed, index), whoever makes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cat_ray.errors import BadInput
from cat_ray.model.generator import Generator
from cat_ray.training.randomness import Purpose, random_stream

SAMPLING_BATCH = 256
CLASS_MEAN_LATENTS = 1024


@dataclass(frozen=True)
class Truncation:
    """Styles drawn towards the mean of their class: w + strength (mean - w) (GAT code).

    Attributes:
        strength: 0 leaves them as they are, 1 gives the mean; StyleGAN's psi is 1 - strength.
        class_means: `[classes, C]`.
    """

    strength: float
    class_means: Tensor

    def applied(self, w: Tensor, labels: Tensor) -> Tensor:
        """The styles `w [B, C]` of classes `[B]`, drawn towards the means."""
        return w.lerp(self.class_means.to(w.device)[labels], self.strength)


def latents(
    seed: int, indices: Sequence[int], width: int, purpose: Purpose = Purpose.SAMPLE_LATENT
) -> Tensor:
    """The latents of some samples, `[len(indices), width]`."""
    draws = [
        random_stream(seed, purpose, index).standard_normal(width, dtype=np.float32)
        for index in indices
    ]
    return torch.from_numpy(np.stack(draws))


def class_labels(
    rule: Literal["uniform", "balanced"], seed: int, indices: Sequence[int], num_classes: int
) -> Tensor:
    """The classes of some samples, `[len(indices)]`: drawn by chance, or each as often as any."""
    if rule == "balanced":
        return torch.tensor(list(indices)) % num_classes
    draws = [
        random_stream(seed, Purpose.SAMPLE_LABEL, index).integers(num_classes) for index in indices
    ]
    return torch.from_numpy(np.asarray(draws, dtype=np.int64))


def check_classes(labels: Sequence[int], num_classes: int) -> None:
    """Looks for class ids that a generator doesn't have.

    Raises:
        BadInput: there is one; the first is named.
    """
    outside = [label for label in labels if not 0 <= label < num_classes]
    if outside:
        raise BadInput(f"class {outside[0]} doesn't exist: there are 0 to {num_classes - 1}")


@torch.no_grad()
def class_means(generator: Generator, device: torch.device) -> Tensor:
    """The mean style of each class, `[classes, C]`, over the same latents for all of them."""
    shape = generator.shape
    z = latents(0, range(CLASS_MEAN_LATENTS), shape.latent_width, Purpose.CLASS_MEAN_LATENT).to(
        device
    )
    means = [
        generator.mapped(z, torch.full((len(z),), label, device=device)).double().mean(dim=0)
        for label in range(shape.num_classes)
    ]
    return torch.stack(means).float().cpu()


@torch.no_grad()
def sample_stages(
    network: nn.Module,
    z: Tensor,
    labels: Tensor,
    device: torch.device,
    truncation: Truncation | None = None,
) -> Tensor:
    """All stage outputs, `[K, N, c, R, R]` on the CPU, made in batches of fixed size.

    `network` takes latents and classes; to truncate, it must be a `Generator`.
    """
    parts = [
        _stages(network, part.to(device), classes.to(device), truncation).cpu()
        for part, classes in zip(z.split(SAMPLING_BATCH), labels.split(SAMPLING_BATCH), strict=True)
    ]
    return torch.cat(parts, dim=1)


def _stages(network: nn.Module, z: Tensor, labels: Tensor, truncation: Truncation | None) -> Tensor:
    if truncation is None:
        return network(z, labels)
    assert isinstance(network, Generator)
    return network.synthesis(truncation.applied(network.mapped(z, labels), labels))


def to_pixels(images: Tensor) -> Tensor:
    """Images `[..., c, R, R]` in [-1, 1] to uint8, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 images to [-1, 1]."""
    return pixels.float() / 127.5 - 1.0
