"""What a checkpoint is on storage: safetensors, `state.json`, and a manifest that is written last.

A folder without a whole manifest is not a checkpoint. Nothing in it depends on how many workers
wrote it or on their ZeRO stages.
"""

import json
from dataclasses import asdict, dataclass

from cat_ray.storage import Location

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1

GENERATOR = "generator.safetensors"
DISCRIMINATOR = "discriminator.safetensors"
GENERATOR_MOMENTS = "generator.moments.safetensors"
DISCRIMINATOR_MOMENTS = "discriminator.moments.safetensors"


def average_file(decay: float) -> str:
    """The file of the generator's average with this decay."""
    return f"generator.average-{decay}.safetensors"


def folder_name(images: int) -> str:
    """The folder of the checkpoint after so many images; names sort as the numbers do."""
    return f"images-{images:012d}"


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint: bytes and sha256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class State:
    """What a run needs beside tensors to go on, and what a reader needs to build the networks.

    Attributes:
        images: images seen, the run's only clock.
        data_digest: hash of the shards' content.
        config: the resolved configuration as YAML.
        versions: of the packages that wrote it.
    """

    images: int
    data_digest: str
    config: str
    versions: dict[str, str]

    def to_json(self) -> bytes:
        """The file's content."""
        return json.dumps(asdict(self), indent=1).encode()


def manifest_json(records: list[FileRecord]) -> bytes:
    """The manifest's content."""
    values = {"format": FORMAT, "files": [asdict(record) for record in records]}
    return json.dumps(values, indent=1).encode()


def read_manifest(checkpoint: Location) -> list[FileRecord] | None:
    """The files of a checkpoint, or None where the folder is not a complete one."""
    place = checkpoint / MANIFEST
    if not place.exists():
        return None
    try:
        values = json.loads(place.read())
        records = [FileRecord(**record) for record in values["files"]]
    except (ValueError, KeyError, TypeError):
        return None
    sizes = checkpoint.sizes()
    whole = all(sizes.get(record.name) == record.bytes for record in records)
    return records if whole and values.get("format") == FORMAT else None
