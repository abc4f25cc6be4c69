"""What a preparation shows to a person: how many images each class has, and what they look like."""

import contextlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from cat_ray.data.decode import BrokenSample
from cat_ray.data.preparation import Output
from cat_ray.data.shard_task import pixels_of
from cat_ray.data.sources import Encoded
from cat_ray.evaluation import plot
from cat_ray.evaluation.grid import grid, to_image, to_png

COLUMNS, SHOWN = 8, 64


def contact_sheet(samples: Iterable[Encoded], output: Output) -> bytes:
    """Some samples side by side as they are cropped, as a PNG file's content."""
    pictures = []
    for sample in samples:
        with contextlib.suppress(BrokenSample):
            pixels = np.array(pixels_of(sample, output))
            pictures.append(torch.from_numpy(pixels).view(*pixels.shape[:2], output.channels))
    if not pictures:
        pictures.append(torch.zeros(output.resolution, output.resolution, output.channels))
    sheet = torch.stack(pictures).to(torch.uint8).permute(0, 3, 1, 2)
    return to_png(to_image(grid(sheet, COLUMNS)))


def histogram(class_counts: Sequence[int]) -> bytes:
    """Images of each class as bars, as a PNG file's content."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(class_counts)), class_counts, width=1.0)
    axes.set_xlabel("class id")
    axes.set_ylabel("images")
    return plot.to_png(figure)
