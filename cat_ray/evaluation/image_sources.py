"""Where images to be measured come from, by their number: a generator, or real ones' files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cat_ray.checkpoint.read import load_generator
from cat_ray.data.index import Extents, Index, read_extents
from cat_ray.data.latents import load_vae
from cat_ray.data.read import Part, Reading, part_of, read_parts
from cat_ray.evaluation.alignment_metrics import alignment_figures
from cat_ray.evaluation.npz import IMAGES, Npz
from cat_ray.evaluation.sampling import (
    Truncation,
    class_labels,
    class_means,
    latents,
    sample_stages,
    to_pixels,
)
from cat_ray.storage import Location

DECODED_TOGETHER = 16


@dataclass(frozen=True)
class Images:
    """Images of some numbers.

    Attributes:
        pixels: `[n, c, H, W]` uint8.
        labels: their classes, `[n]`, where they are known.
        figures: what else was measured of each while it was made, `[n]`, by name.
    """

    pixels: Tensor
    labels: Tensor | None = None
    figures: Mapping[str, Tensor] = field(default_factory=dict)


MakeImages = Callable[[range], Images]


class ImageSource(Protocol):
    """Images that have numbers."""

    def load(self, device: torch.device) -> MakeImages:
        """What gives the images of some numbers."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything that the images follow from."""
        ...


@dataclass(frozen=True)
class Generated:
    """Samples of a checkpoint.

    Attributes:
        checkpoint: its folder.
        digest: the sha256 of its manifest.
        decay: which average of the weights.
        seed: of latents and labels.
        labels: the rule that they follow.
        truncation: how far styles are drawn to the mean of their class.
        vae: that decodes latents, if the generator makes any.
        revision: of the VAE.
    """

    checkpoint: Location
    digest: str
    decay: float
    seed: int
    labels: Literal["uniform", "balanced"]
    truncation: float
    vae: str | None
    revision: str | None

    def identity(self) -> dict[str, Any]:
        """Everything that the samples follow from."""
        return {name: value for name, value in vars(self).items() if name != "checkpoint"}

    def load(self, device: torch.device) -> MakeImages:
        """Loads generator and VAE."""
        generator = load_generator(self.checkpoint, self.decay, device)
        shape = generator.shape
        codec = load_vae(self.vae, self.revision).to(device) if self.vae else None
        truncation = None
        if self.truncation:
            truncation = Truncation(self.truncation, class_means(generator, device))

        def images(numbers: range) -> Images:
            z = latents(self.seed, numbers, shape.latent_width)
            labels = class_labels(self.labels, self.seed, numbers, shape.num_classes)
            stages = sample_stages(generator, z, labels, device, truncation)
            made = stages[-1]
            if codec is not None:
                parts = made.split(DECODED_TOGETHER)
                made = torch.cat([codec.decode(part.to(device)).cpu() for part in parts])
            return Images(to_pixels(made), labels, alignment_figures(stages))

        return images


@dataclass(frozen=True)
class FromShards:
    """Real images, in the order in which they lie in their shards."""

    reading: Reading
    index: Index

    def identity(self) -> dict[str, Any]:
        """The index, and the size to which images are brought."""
        reading = self.reading
        return {"shards": self.index.digest(), "side": reading.resolution, "crop": reading.crop}

    def load(self, device: torch.device) -> MakeImages:
        """Nothing but the index of where they lie."""
        del device
        extents = read_extents(self.reading.folder, self.index)

        def images(numbers: range) -> Images:
            batch = read_parts(self.reading, self._parts(extents, numbers))
            pixels = torch.from_numpy(batch.content).permute(0, 3, 1, 2)
            return Images(pixels, torch.from_numpy(batch.labels))

        return images

    def _parts(self, extents: Extents, numbers: range) -> list[Part]:
        block = self.index.block_images()
        ends = list(accumulate(shard.count for shard in self.index.shards))
        found: list[Part] = []
        for place, (shard, end) in enumerate(zip(self.index.shards, ends, strict=True)):
            first = end - shard.count
            members = range(max(numbers.start, first) - first, min(numbers.stop, end) - first)
            for _, together in groupby(members, key=lambda member: member // block):
                found.append(part_of(self.index, extents, block, place, list(together)))
        return found


@dataclass(frozen=True)
class FromNpz:
    """The images in a file of ADM's format.

    Attributes:
        place: the file.
        sha256: of it.
        channels: of the images. In such a file grey has three equal ones.
    """

    place: Location
    sha256: str
    channels: int

    def identity(self) -> dict[str, Any]:
        """The file's hash."""
        return {"npz": self.sha256, "channels": self.channels}

    def load(self, device: torch.device) -> MakeImages:
        """Nothing: the file is opened for each range."""
        del device

        def images(numbers: range) -> Images:
            with self.place.opened() as file:
                npz = Npz(file, self.place.uri)
                rows = next(npz.rows(IMAGES, len(numbers), numbers.start))
            return Images(torch.from_numpy(rows.copy()).permute(0, 3, 1, 2)[:, : self.channels])

        return images
