"""What is kept of measured images themselves: their pixels, PNG files, WebDataset shards."""

from collections.abc import Iterator
from dataclasses import dataclass

import safetensors.torch
from torch import Tensor

from cat_ray.data.shard_file import Entry, write_shard_file
from cat_ray.evaluation.grid import to_image, to_png
from cat_ray.evaluation.image_sources import Images
from cat_ray.storage import Location

PIXELS = "pixels"


@dataclass(frozen=True)
class Copies:
    """Which are kept, and where.

    Attributes:
        pixels: of the first so many images, in whole ranges, for what is made of all together.
        png: a folder for a file of each image.
        shards: a folder for a shard of each range.
    """

    pixels: int = 0
    png: Location | None = None
    shards: Location | None = None

    def places(self, folder: Location, numbers: range) -> list[Location]:
        """The last files that `write` writes for a range; `folder` is the range's own."""
        found = [pixels_place(folder, numbers)] if numbers.start < self.pixels else []
        if self.png is not None:
            found.append(png_place(self.png, numbers[-1]))
        if self.shards is not None:
            found.append(self.shards / _shard_name(numbers))
        return found

    def write(self, folder: Location, numbers: range, images: Images) -> None:
        """Keeps the images of a range."""
        if numbers.start < self.pixels:
            content = safetensors.torch.save({PIXELS: images.pixels})
            pixels_place(folder, numbers).write(content)
        if self.png is None and self.shards is None:
            return
        files = [to_png(to_image(picture)) for picture in images.pixels]
        if self.png is not None:
            for number, content in zip(numbers, files, strict=True):
                png_place(self.png, number).write(content)
        if self.shards is not None:
            write_shard_file(
                self.shards, _shard_name(numbers), _entries(numbers, files, images.labels)
            )


def pixels_place(folder: Location, numbers: range) -> Location:
    """The file of a range's pixels."""
    return folder / f"images-{numbers.start:09d}-{numbers.stop:09d}.pixels.safetensors"


def png_place(folder: Location, number: int) -> Location:
    """The file of an image."""
    return folder / f"{number:06d}.png"


def read_pixels(folder: Location, numbers: range) -> Tensor:
    """The pixels of a finished range, `[n, c, H, W]` uint8."""
    return safetensors.torch.load(pixels_place(folder, numbers).read())[PIXELS]


def _shard_name(numbers: range) -> str:
    return f"samples-{numbers.start:09d}.tar"


def _entries(numbers: range, files: list[bytes], labels: Tensor | None) -> Iterator[Entry]:
    assert labels is not None, "what has no classes makes no shard"
    for number, content, label in zip(numbers, files, labels.tolist(), strict=True):
        yield Entry(f"{number:09d}", {"png": content, "cls": str(label).encode()}, [label])
