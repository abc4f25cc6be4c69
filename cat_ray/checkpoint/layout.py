"""What a checkpoint is on storage: slices in safetensors, `state.json`, a manifest written last.

    checkpoints/images-000012800000-3f9a1c/
        generator.00-of-02.safetensors   flat fp32 slices by parameter name; other groups likewise
        part-00-of-02.json               what worker 0 of 2 wrote: bytes, sha256, slices
        state.json                       images seen, configuration, versions
        manifest.json                    all parts together: the commit

A folder without a whole manifest is not a checkpoint. What is read from one depends neither on how
many workers wrote it nor on their ZeRO stages. The folder's last six letters are the worker
group's, so that a group that was given up, but still runs somewhere, can't spoil another's files.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from cat_ray.errors import BadInput
from cat_ray.storage import Location

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
DAMAGED = "damaged"
STATE = "state.json"
FORMAT = 2

GENERATOR = "generator"
DISCRIMINATOR = "discriminator"
GENERATOR_MOMENTS = "generator.moments"
DISCRIMINATOR_MOMENTS = "discriminator.moments"


def average_group(decay: float) -> str:
    """The group of tensors that is the generator's average with this decay."""
    return f"generator.average-{decay}"


def folder_name(images: int, worker_group: str) -> str:
    """The folder of the checkpoint after so many images; names sort as the numbers do."""
    return f"images-{images:012d}-{worker_group}"


def slice_file(group: str, rank: int, world_size: int) -> str:
    """The file with one worker's slices of a group of tensors."""
    return f"{group}.{rank:02d}-of-{world_size:02d}.safetensors"


def part_file(rank: int, world_size: int) -> str:
    """The record of what one worker wrote."""
    return f"part-{rank:02d}-of-{world_size:02d}.json"


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint: bytes and sha256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SliceRecord:
    """Where elements `offset` to `offset + length` of a flattened tensor of this shape lie."""

    group: str
    tensor: str
    shape: tuple[int, ...]
    offset: int
    length: int
    file: str


@dataclass(frozen=True)
class Part:
    """What one worker wrote, or, as a manifest, what all of them did."""

    files: tuple[FileRecord, ...]
    slices: tuple[SliceRecord, ...]

    def to_json(self) -> bytes:
        """The file's content: the files, and the slices by group and tensor."""
        groups: dict[str, dict] = {}
        for piece in self.slices:
            tensors = groups.setdefault(piece.group, {})
            tensor = tensors.setdefault(piece.tensor, {"shape": piece.shape, "slices": []})
            tensor["slices"].append([piece.file, piece.offset, piece.length])
        values = {
            "format": FORMAT,
            "files": [asdict(record) for record in self.files],
            "tensors": groups,
        }
        return json.dumps({**values, "sha256": _digest(values)}, indent=1).encode()


@dataclass(frozen=True)
class State:
    """What a run needs beside tensors to go on, and what a reader needs to build the networks.

    Attributes:
        images: images seen, the run's only clock.
        noise_stream: how often the run was rolled back; each time it goes on with other noise.
        data_digest: hash of the shards' content.
        config: the resolved configuration as YAML.
        versions: of the packages that wrote it.
        generator_steps, discriminator_steps: optimiser steps that each network has taken; None in
            older checkpoints. Fewer than the run's steps where DeepSpeed skipped some.
    """

    images: int
    noise_stream: int
    data_digest: str
    config: str
    versions: dict[str, str]
    generator_steps: int | None = None
    discriminator_steps: int | None = None

    def to_json(self) -> bytes:
        """The file's content."""
        return json.dumps(asdict(self), indent=1).encode()


def parse_part(content: bytes) -> Part | None:
    """A part or a manifest from its file's content, or None where it is damaged.

    Raises:
        BadInput: it was written by a version with another format.
    """
    try:
        values = json.loads(content)
        digest, found = values.pop("sha256", None), values["format"]
        if digest is not None and digest != _digest(values):
            return None
        if found == FORMAT:
            if digest is None:
                return None
            return Part(
                tuple(FileRecord(**record) for record in values["files"]),
                tuple(
                    SliceRecord(group, tensor, tuple(entry["shape"]), offset, length, file)
                    for group, tensors in values["tensors"].items()
                    for tensor, entry in tensors.items()
                    for file, offset, length in entry["slices"]
                ),
            )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    raise BadInput(f"a checkpoint has format {found}, this version reads {FORMAT}")


def _digest(values: dict) -> str:
    """The sha256 of a part, which it carries itself."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def join(parts: Iterable[Part]) -> Part:
    """All workers' parts as one manifest.

    Raises:
        ValueError: together they don't hold each element of each tensor exactly once.
    """
    parts = list(parts)
    files = {record.name: record for part in parts for record in part.files}
    slices = sorted(
        (piece for part in parts for piece in part.slices),
        key=lambda piece: (piece.group, piece.tensor, piece.offset),
    )
    ends: dict[tuple[str, str], int] = {}
    for piece in slices:
        at = (piece.group, piece.tensor)
        if piece.offset != ends.get(at, 0):
            raise ValueError(f"{piece.group}: {piece.tensor} has a gap or an overlap")
        ends[at] = piece.offset + piece.length
    for piece in slices:
        if ends[piece.group, piece.tensor] != math.prod(piece.shape):
            raise ValueError(f"{piece.group}: {piece.tensor} is not whole")
    return Part(tuple(sorted(files.values(), key=lambda record: record.name)), tuple(slices))


def read_manifest(checkpoint: Location) -> tuple[FileRecord, ...] | None:
    """The files of a checkpoint, or None where the folder is not a complete one."""
    manifest = read_whole(checkpoint)
    return manifest.files if manifest else None


def read_whole(checkpoint: Location) -> Part | None:
    """The manifest of a checkpoint whose files all have the bytes that it says, or None.

    Raises:
        BadInput: another version wrote it, or the storage fails.
    """
    sizes = checkpoint.sizes()
    if MANIFEST not in sizes:
        return None
    manifest = parse_part((checkpoint / MANIFEST).read())
    if manifest is None:
        return None
    whole = all(sizes.get(record.name) == record.bytes for record in manifest.files)
    return manifest if whole else None
