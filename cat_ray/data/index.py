"""`index.json`: which shards a data set has, how much is in each, and what they hold.

`extents.safetensors` beside it says where in a shard each sample lies, so that some of them can be
read without the rest.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load, save

from cat_ray.errors import BadInput
from cat_ray.storage import Location

INDEX_NAME = "index.json"
EXTENTS_NAME = "extents.safetensors"
FORMAT = 2
BLOCK_BYTES = 2**20

Extents = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, samples, bytes and sha256."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """A data set: square images, or latents, with a class each.

    Attributes:
        contents: `images`, encoded, or `latents`, mean and standard deviation of a VAE's posterior.
        resolution: the side of the images or latents; None if images have various sizes.
        channels: of an image or a latent.
        class_counts: samples of each class.
        source: what the shards were made from, for people.
        shards: in the order of the data set.
        extents_sha256: of the file that says where each sample lies.
        pack_images: samples that are stored as one; 1 for images.
        made_with: how latents came about: the VAE's name, revision, scaling factor and the like.
    """

    contents: Literal["images", "latents"]
    resolution: int | None
    channels: int
    class_counts: tuple[int, ...]
    source: str
    shards: tuple[Shard, ...]
    extents_sha256: str
    pack_images: int = 1
    made_with: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Samples in all shards together."""
        return sum(shard.count for shard in self.shards)

    def describe(self) -> str:
        """What there is, for a person."""
        side = f"{self.channels} x {self.resolution} x {self.resolution}"
        return (
            f"{self.images:,} {self.contents} of {sum(map(bool, self.class_counts)):,} classes, "
            f"{side if self.resolution else 'of various sizes'}, in {len(self.shards):,} shards"
        )

    def digest(self) -> str:
        """A hash of what the samples are, wherever they lie: part of a run's identity."""
        content = [(shard.name, shard.count, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def block_images(self) -> int:
        """How many neighbouring samples are about a mebibyte, in whole packs."""
        sample_bytes = sum(shard.bytes for shard in self.shards) / max(1, self.images)
        packs = BLOCK_BYTES / max(1.0, sample_bytes) / self.pack_images
        return max(1, round(packs)) * self.pack_images

    def to_json(self) -> bytes:
        """The file's content."""
        values: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        return json.dumps(values, indent=1).encode()


def write_index(folder: Location, index: Index, extents: Extents) -> Index:
    """Writes both files, the index last, and returns it with the hash of the extents.

    `extents` has for each shard, by name, where each of its packs begins, and where the last ends,
    in bytes from the shard's beginning: `[packs + 1]`.
    """
    content = save({name: np.asarray(places, dtype=np.int64) for name, places in extents.items()})
    (folder / EXTENTS_NAME).write(content)
    index = replace(index, extents_sha256=hashlib.sha256(content).hexdigest())
    (folder / INDEX_NAME).write(index.to_json())
    return index


def read_index(folder: Location) -> Index:
    """Reads `index.json` of a folder of shards.

    Raises:
        BadInput: there is none, or it isn't one that this version can read.
    """
    place = folder / INDEX_NAME
    if not place.exists():
        raise BadInput(
            f"{folder.uri} has no {INDEX_NAME}: make the shards with `cat-ray prepare`, "
            "or index those of others with `cat-ray index`"
        )
    try:
        values = json.loads(place.read())
        if not isinstance(values, dict) or values.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}, `cat-ray index` makes one")
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        return Index(**{**values, "class_counts": tuple(values["class_counts"])}, shards=shards)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{place.uri} is not a shard index: {error}") from error


def read_extents(folder: Location, index: Index) -> Extents:
    """Where in each shard its packs lie, as `write_index` took it.

    Raises:
        BadInput: the file isn't the one that the index tells of.
    """
    place = folder / EXTENTS_NAME
    content = place.read()
    if hashlib.sha256(content).hexdigest() != index.extents_sha256:
        raise BadInput(
            f"{place.uri} is not the one of {INDEX_NAME}: make both anew with `cat-ray index`"
        )
    return load(content)


def check_shards(index: Index, folder: Location) -> None:
    """Compares each shard's size in storage with the index, in one listing.

    Raises:
        BadInput: a shard is missing or has another size; all such are named.
    """
    found = folder.sizes()
    problems = [
        f"{shard.name} is missing"
        if shard.name not in found
        else f"{shard.name} has {found[shard.name]} bytes, not {shard.bytes}: truncated or replaced"
        for shard in index.shards
        if found.get(shard.name) != shard.bytes
    ]
    if problems:
        listed = "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
        raise BadInput(f"shards in {folder.uri} are not as indexed: {listed}. Prepare them again")


def check_fits(index: Index, resolution: int, channels: int, num_classes: int) -> None:
    """Compares what the shards hold with what is to be read from them.

    Images of various sizes are cropped to any side, and square ones reduced to any smaller side.

    Raises:
        BadInput: other shape, or a class id outside `num_classes`.
    """
    side = index.resolution or resolution
    fits = side >= resolution if index.contents == "images" else side == resolution
    if not fits or index.channels != channels:
        raise BadInput(
            f"the shards hold {index.channels} x {index.resolution} x {index.resolution} "
            f"{index.contents}, model.channels and model.resolution ask for {channels} and "
            f"{resolution}: change the job, or prepare other shards"
        )
    used = [label for label, count in enumerate(index.class_counts) if count]
    if used and used[-1] >= num_classes:
        raise BadInput(
            f"the shards hold class id {used[-1]}, outside data.num_classes {num_classes}: "
            f"set it to at least {used[-1] + 1}, or look for wrong ones with "
            f"`cat-ray index --verify --num-classes {num_classes}`"
        )
