"""`index.json`: which shards a data set has, how much is in each, and what they hold.

`extents.safetensors` beside it says where in a shard each sample lies, so that some of them can be
read without the rest.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cat_ray.data.labels import MAX_CLASSES
from cat_ray.errors import BadInput, Damaged, NotFound
from cat_ray.json_text import parse_json
from cat_ray.storage import Location

if TYPE_CHECKING:
    from pydantic import TypeAdapter

INDEX_NAME = "index.json"
EXTENTS_NAME = "extents.safetensors"
FORMAT = 2
BLOCK_BYTES = 2**20
# An index counts the samples of every class id up to the largest.
# Where the file must be strict; pydantic looks at it.
STRICT: dict[str, Any] = {"strict": True, "extra": "forbid"}

Count = Annotated[int, Ge(0), Le(2**62)]
Side = Annotated[int, Ge(1), Le(2**16)]
Extents = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, samples, bytes and sha256."""

    __pydantic_config__: ClassVar = STRICT

    name: str
    count: Count
    bytes: Count
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

    __pydantic_config__: ClassVar = STRICT

    contents: Literal["images", "latents"]
    resolution: Side | None
    channels: Side
    class_counts: tuple[Count, ...]
    source: str
    shards: tuple[Shard, ...]
    extents_sha256: str
    pack_images: Annotated[int, Ge(1), Le(2**31)] = 1
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


def dense(class_counts: Mapping[int, int]) -> tuple[int, ...]:
    """Samples of every class from 0 to the largest, as an index has them.

    Raises:
        BadInput: a class id is negative, or too large to be one.
    """
    if wrong := [label for label in class_counts if not 0 <= label < MAX_CLASSES]:
        raise BadInput(
            f"class id {wrong[0]} is not in 0 to {MAX_CLASSES - 1:,}: number the classes from 0 on"
        )
    return tuple(class_counts.get(label, 0) for label in range(max(class_counts, default=-1) + 1))


def check_is_ours(folder: Location) -> None:
    """Looks whether an index that is to be replaced is one of cat-ray's, or only half of one.

    Raises:
        BadInput: it is another program's.
    """
    place = folder / INDEX_NAME
    try:
        found = parse_json(place.read())
    except (NotFound, ValueError):
        return
    if not (isinstance(found, dict) and {"format", "shards"} & found.keys()):
        raise BadInput(f"{place.uri} is another program's: move it elsewhere, then index again")


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
        BadInput: there is none.
        Damaged: it isn't one that this version can read.
    """
    place = folder / INDEX_NAME
    if not place.exists():
        raise BadInput(
            f"{folder.uri} has no {INDEX_NAME}: make the shards with `cat-ray prepare`, "
            "or index those of others with `cat-ray index`"
        )
    from pydantic import ValidationError

    try:
        file = _schema().validate_json(place.read())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise _no_index(place, f"{at}: {first['msg']}" if at else first["msg"]) from error
    index = Index(**{part.name: getattr(file, part.name) for part in fields(Index)})
    if told := _inconsistency(index):
        raise _no_index(place, told)
    return index


@cache
def _schema() -> "TypeAdapter[Index]":
    # Processes that only read blocks need no pydantic, which takes a while to import.
    from pydantic import TypeAdapter

    @dataclass(frozen=True, kw_only=True)
    class File(Index):
        format: Literal[2]

    return TypeAdapter(File)


def _inconsistency(index: Index) -> str | None:
    """What in an index can't be, though each value by itself could."""
    names = Counter(shard.name for shard in index.shards)
    for shard in index.shards:
        if shard.name in ("", ".", "..") or "/" in shard.name or names[shard.name] > 1:
            return f"shard {shard.name!r} is no file of its own in the folder"
        if shard.count > shard.bytes:
            return f"shard {shard.name} can't hold {shard.count:,} samples in {shard.bytes:,} bytes"
    factor = index.made_with.get("scaling_factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        return f"made_with.scaling_factor: {factor!r} is no number"
    return None


def _no_index(place: Location, why: str) -> Damaged:
    return Damaged(f"{place.uri} is not a shard index: {why}. Make it anew with `cat-ray index`")


def read_extents(folder: Location, index: Index) -> Extents:
    """Where in each shard its packs lie, as `write_index` took it.

    Raises:
        Damaged: the file isn't the one that the index tells of, or can't be right.
        BadInput: there is none.
    """
    place = folder / EXTENTS_NAME
    content = place.read()
    if hashlib.sha256(content).hexdigest() != index.extents_sha256:
        raise Damaged(
            f"{place.uri} is not the one of {INDEX_NAME}: make both anew with `cat-ray index`"
        )
    try:
        extents = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        why = f"is no safetensors file ({error})"
        raise Damaged(f"{place.uri} {why}: make it anew with `cat-ray index`") from error
    for shard in index.shards:
        if not _fit(extents.get(shard.name), -(-shard.count // index.pack_images)):
            raise Damaged(
                f"{place.uri} doesn't tell where the samples of {shard.name} lie: make it and "
                f"{INDEX_NAME} anew with `cat-ray index`"
            )
    return extents


def _fit(places: np.ndarray | None, packs: int) -> bool:
    """Whether so many packs can begin and end at these places."""
    if places is None or places.dtype != np.int64 or places.shape != (packs + 1,):
        return False
    return bool(places[0] >= 0 and (places[1:] > places[:-1]).all())


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
