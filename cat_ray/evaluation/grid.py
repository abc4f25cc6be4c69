"""Pictures of samples for a person to look at."""

import io

import numpy as np
from PIL import Image
from torch import Tensor

from cat_ray.evaluation.sampling import to_pixels

GAP = 4
SMALLEST_SIDE = 32


def to_image(pixels: Tensor) -> Image.Image:
    """`[c, H, W]` uint8 with one or three channels to a picture; of other channels the first."""
    values = pixels.numpy()
    if len(values) == 3:
        return Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))
    return Image.fromarray(values[0])


def grid(images: Tensor, columns: int) -> Tensor:
    """`[N, c, R, R]` side by side, row after row: `[c, rows * R, columns * R]`."""
    count, channels, side, _ = images.shape
    rows = -(-count // columns)
    canvas = images.new_zeros(rows * columns, channels, side, side)
    canvas[:count] = images
    tiles = canvas.view(rows, columns, channels, side, side).permute(2, 0, 3, 1, 4)
    return tiles.reshape(channels, rows * side, columns * side)


def stage_grid(outputs: Tensor, columns: int) -> Image.Image:
    """Stage outputs `[K, N, c, R, R]` in [-1, 1]: the same samples K times, coarse stage first."""
    panels = [grid(to_pixels(output), columns) for output in outputs]
    channels, height, width = panels[0].shape
    canvas = panels[0].new_full((channels, height, len(panels) * (width + GAP) - GAP), 255)
    for place, panel in enumerate(panels):
        left = place * (width + GAP)
        canvas[:, :, left : left + width] = panel
    return to_image(canvas)


def to_png(image: Image.Image) -> bytes:
    """The picture as a PNG file's content."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()
