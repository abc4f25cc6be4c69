"""DiffAugment: differentiable augmentation as a pure function of numbers drawn beforehand.

The same draws give the same augmentation on every stage's output, on a perturbed copy and, where
geometry is concerned, on the image that the teacher sees.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from cat_ray.objective.settings import AugmentPolicy


@dataclass(frozen=True)
class AugmentDraws:
    """The random numbers of one batch's augmentation, each `[B]`; lengths are shares of a side."""

    brightness: Tensor
    saturation: Tensor
    contrast: Tensor
    shift_rows: Tensor
    shift_columns: Tensor
    cut_row: Tensor
    cut_column: Tensor
    flip: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> "AugmentDraws":
        """The same draws with a function applied to each tensor, such as one to a device."""
        return AugmentDraws(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


def concatenate(draws: list[AugmentDraws]) -> AugmentDraws:
    """Several batches' draws as one, in order."""
    names = [field.name for field in fields(AugmentDraws)]
    return AugmentDraws(**{name: torch.cat([getattr(d, name) for d in draws]) for name in names})


def draw(
    policy: AugmentPolicy, images: int, side: int, random: np.random.Generator
) -> AugmentDraws:
    """Draws the augmentation of so many images; always as many numbers, whatever the policy.

    Shifts are whole pixels of images of this side, each as likely as another, so that an image of
    another resolution can be moved by exactly as much.
    """
    uniform = torch.from_numpy(random.random((11, images), dtype=np.float32))
    furthest = round(policy.translation * side)

    def shift(values: Tensor) -> Tensor:
        return ((values * (2 * furthest + 1)).floor() - furthest) / side

    colored = uniform[:3] < policy.color
    return AugmentDraws(
        brightness=torch.where(colored[0], uniform[3] - 0.5, 0.0),
        saturation=torch.where(colored[1], uniform[4] * 2.0, 1.0),
        contrast=torch.where(colored[2], uniform[5] + 0.5, 1.0),
        shift_rows=shift(uniform[6]),
        shift_columns=shift(uniform[7]),
        cut_row=uniform[8],
        cut_column=uniform[9],
        flip=uniform[10] < policy.flip,
    )


def augment(images: Tensor, draws: AugmentDraws, policy: AugmentPolicy) -> Tensor:
    """Colour, then geometry, then cutout, on `[B, c, S, S]`."""
    return _cut(move(_color(images, draws), draws), draws, policy.cutout)


def augment_stages(outputs: Tensor, draws: AugmentDraws, policy: AugmentPolicy) -> Tensor:
    """The same augmentation of each image on all of its stage outputs `[K, B, c, S, S]`."""
    return torch.stack([augment(output, draws, policy) for output in outputs])


def move(images: Tensor, draws: AugmentDraws) -> Tensor:
    """Only the geometry, on `[B, c, S, S]` of any side: flip, then shift by whole pixels.

    What is shifted in is zero.
    """
    side = images.shape[-1]
    images = torch.where(draws.flip[:, None, None, None], images.flip(-1), images)
    rows, rows_inside = _source(draws.shift_rows, side)
    columns, columns_inside = _source(draws.shift_columns, side)
    images = images.gather(2, rows[:, None, :, None].expand_as(images))
    images = images.gather(3, columns[:, None, None, :].expand_as(images))
    return images * (rows_inside[:, None, :, None] & columns_inside[:, None, None, :])


def _source(shift: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Where each output position is read from, `[B, S]`, and whether that lies inside."""
    pixels = (shift * side).round().long()
    source = torch.arange(side, device=shift.device)[None] - pixels[:, None]
    return source.clamp(0, side - 1), (source >= 0) & (source < side)


def _color(images: Tensor, draws: AugmentDraws) -> Tensor:
    def each(values: Tensor) -> Tensor:
        return values[:, None, None, None]

    images = images + each(draws.brightness)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * each(draws.saturation) + grey
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - level) * each(draws.contrast) + level


def _cut(images: Tensor, draws: AugmentDraws, share: float) -> Tensor:
    side = images.shape[-1]
    length = round(share * side)
    if length == 0:
        return images
    positions = torch.arange(side, device=images.device)[None]

    def span(centre: Tensor) -> Tensor:
        start = (centre[:, None] * (side + 1 - length % 2)).floor().long() - length // 2
        return (positions >= start) & (positions < start + length)

    hole = span(draws.cut_row)[:, None, :, None] & span(draws.cut_column)[:, None, None, :]
    return images * ~hole
