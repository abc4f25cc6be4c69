"""`index.json`: which shards a data set has, how much is in each, and what they hold."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from cat_ray.errors import BadInput
from cat_ray.storage import Location

INDEX_NAME = "index.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, samples, bytes and sha256."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """A data set: square images `[channels, resolution, resolution]` with a class each."""

    resolution: int
    channels: int
    class_counts: tuple[int, ...]
    source: str
    shards: tuple[Shard, ...]

    @property
    def images(self) -> int:
        """Samples in all shards together."""
        return sum(shard.count for shard in self.shards)

    def digest(self) -> str:
        """A hash of what the samples are, wherever they lie: part of a run's identity."""
        content = [(shard.name, shard.count, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The file's content."""
        values: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        return json.dumps(values, indent=1).encode()


def read_index(folder: Location) -> Index:
    """Reads `index.json` of a folder of shards.

    Raises:
        BadInput: there is none, or it isn't one that this version can read.
    """
    place = folder / INDEX_NAME
    if not place.exists():
        raise BadInput(f"{folder.uri} has no {INDEX_NAME}: make the shards with `cat-ray prepare`")
    try:
        values = json.loads(place.read())
        if not isinstance(values, dict) or values.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        return Index(**{**values, "class_counts": tuple(values["class_counts"])}, shards=shards)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{place.uri} is not a shard index: {error}") from error


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
    """Compares what the shards hold with what the model takes.

    Raises:
        BadInput: other image shape, or a class id outside `num_classes`.
    """
    if (index.resolution, index.channels) != (resolution, channels):
        raise BadInput(
            f"the shards hold {index.channels} x {index.resolution} x {index.resolution} images, "
            f"model.channels and model.resolution say {channels} and {resolution}"
        )
    used = [label for label, count in enumerate(index.class_counts) if count]
    if used and used[-1] >= num_classes:
        raise BadInput(
            f"the shards hold class id {used[-1]}, outside data.num_classes {num_classes}: "
            f"set it to at least {used[-1] + 1}"
        )
