"""What a checkpoint is on storage: slices in safetensors, `state.json`, a manifest written last.

    checkpoints/images-000012800000-3f9a1c/
        generator.00-of-02.safetensors   flat fp32 slices by parameter name; other groups likewise
        part-00-of-02.json               what worker 0 of 2 wrote: bytes, sha256, slices
        state.json                       images seen, configuration, versions
        manifest.json                    all parts together: the commit

A folder without a whole manifest is not a checkpoint. What is read from one depends neither on how
many workers wrote it nor on their ZeRO stages. The folder's last six letters are the worker
group's, so that a group that was given up, but still runs somewhere, can't spoil another's files.
A folder or file with a name of any other form is somebody else's: it is neither read nor deleted.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from cat_ray.checkpoint.records import (
    LONGEST_SHOWN,
    NO_MORE_KEYS,
    Count,
    FileRecord,
    Part,
    check_coverage,
    first_problem,
    parse_part,
)
from cat_ray.errors import Damaged, NotFound
from cat_ray.storage import Location

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
DAMAGED = "damaged"
STATE = "state.json"
FLOAT_BYTES = 4

GENERATOR = "generator"
DISCRIMINATOR = "discriminator"
GENERATOR_MOMENTS = "generator.moments"
DISCRIMINATOR_MOMENTS = "discriminator.moments"

# Of `folder_name`, `slice_file` and so on: the forms of what they return.
FOLDER_FORM = re.compile(r"images-([0-9]{12}|[1-9][0-9]{12,17})-[0-9a-f]{6}(-staying)?")
SLICE_FORM = re.compile(
    r"((?:generator|discriminator)(?:\.moments)?|generator\.average-[0-9.e-]+)"
    r"\.[0-9]{2,}-of-[0-9]{2,}\.safetensors"
)
PART_FORM = re.compile(r"part-[0-9]{2,}-of-([0-9]{2,9})\.json")
LEASE_FORM = re.compile(r"lease-[0-9a-f]{8}\.json")
# Of safetensors, while it writes.
TEMPORARY_FORM = re.compile(r"\.tmp[0-9A-Za-z]{6}")

Answer = TypeVar("Answer")


def average_group(decay: float) -> str:
    """The group of tensors that is the generator's average with this decay."""
    return f"generator.average-{decay}"


def folder_name(images: int, worker_group: str) -> str:
    """The folder of the checkpoint after so many images; names sort as the numbers do."""
    return f"images-{images:012d}-{worker_group}"


def images_of(name: str) -> int:
    """Images seen of a checkpoint, from its folder's name.

    Raises:
        ValueError: a folder of this name is no checkpoint's.
    """
    match = FOLDER_FORM.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not the name of a checkpoint's folder")
    return int(match[1])


def checkpoint_folders(run: Location) -> list[Location]:
    """The folders of a run's checkpoints, complete or not, in the order of their images.

    No folder with a name of another form is among them.
    """
    own = [found for found in (run / FOLDER).folders() if FOLDER_FORM.fullmatch(found.name)]
    return sorted(own, key=lambda folder: (images_of(folder.name), folder.name))


def slice_file(group: str, rank: int, world_size: int) -> str:
    """The file with one worker's slices of a group of tensors."""
    return f"{group}.{rank:02d}-of-{world_size:02d}.safetensors"


def part_file(rank: int, world_size: int) -> str:
    """The record of what one worker wrote."""
    return f"part-{rank:02d}-of-{world_size:02d}.json"


def is_own_file(name: str) -> bool:
    """Whether a file in a checkpoint's folder has a name that this program gives, whole or not."""
    if name.startswith(".") and name.endswith(".partial"):
        name = name[1:].removesuffix(".partial")
    forms = (SLICE_FORM, PART_FORM, LEASE_FORM, TEMPORARY_FORM)
    return name in (MANIFEST, STATE, DAMAGED) or any(form.fullmatch(name) for form in forms)


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

    __pydantic_config__ = NO_MORE_KEYS

    images: Count
    noise_stream: Count
    data_digest: str
    config: str
    versions: dict[str, str]
    generator_steps: Count | None = None
    discriminator_steps: Count | None = None

    def to_json(self) -> bytes:
        """The file's content."""
        return json.dumps(asdict(self), indent=1).encode()


_STATE = TypeAdapter(State)


def parse_state(content: bytes) -> State:
    """Parse a state from its file's content.

    Raises:
        ValueError: it is no checkpoint's state.
    """
    try:
        return _STATE.validate_json(content, strict=True)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error


def parse_manifest(content: bytes) -> Part:
    """Parse a manifest from its file's content.

    Raises:
        ValueError: as `parse_part`; or its slices don't hold each element of each tensor exactly
            once, in files that it lists and that only a checkpoint has.
        BadInput: it was written by a version with another format.
    """
    manifest = parse_part(content)
    listed = {record.name: record.bytes for record in manifest.files}
    if len(listed) < len(manifest.files):
        raise ValueError("it lists a file twice")
    if STATE not in listed:
        raise ValueError(f"it does not list {STATE}")
    foreign = [name for name in listed if name != STATE and not SLICE_FORM.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"it lists {foreign[0][:LONGEST_SHOWN]!r}, which is no file of a checkpoint"
        )
    check_coverage(manifest.slices)
    held: Counter[str] = Counter()
    for piece in manifest.slices:
        match = SLICE_FORM.fullmatch(piece.file)
        if piece.file not in listed or match is None or match[1] != piece.group:
            raise ValueError(f"{piece.group}: {piece.tensor} lies in a file that it does not list")
        held[piece.file] += FLOAT_BYTES * piece.length
    short = [name for name, size in held.items() if size > listed[name]]
    if short:
        raise ValueError(f"{short[0]} is too short for its slices")
    if unused := listed.keys() - held.keys() - {STATE}:
        raise ValueError(f"it has no slices in {min(unused)}")
    if len({(piece.file, piece.tensor) for piece in manifest.slices}) < len(manifest.slices):
        raise ValueError("two slices of one tensor lie in one file")
    return manifest


def parsed(place: Location, parse: Callable[[bytes], Answer]) -> Answer:
    """A file's content as `parse` has it.

    Raises:
        Damaged: `parse` raised a ValueError.
        NotFound: there is no such file.
    """
    content = place.read()
    try:
        return parse(content)
    except ValueError as error:
        raise Damaged(f"{place.uri} is damaged: {error}") from error


def read_listed(checkpoint: Location) -> tuple[Part, dict[str, str]]:
    """Read a checkpoint's manifest, and judge the files by their sizes.

    Returns:
        The manifest, and a line for each of its files that is missing or has another size.

    Raises:
        NotFound: it was never committed.
        Damaged: the manifest is not as it was written.
        BadInput: another version wrote it.
    """
    sizes = checkpoint.sizes()
    if MANIFEST not in sizes:
        raise NotFound(f"{checkpoint.uri} is not a complete checkpoint: it has no {MANIFEST}")
    manifest, wrong = parsed(checkpoint / MANIFEST, parse_manifest), {}
    for record in manifest.files:
        place, size = checkpoint / record.name, sizes.get(record.name)
        if size is None:
            wrong[record.name] = f"{place.uri} doesn't exist"
        elif size != record.bytes:
            told = f"it has {size:,} bytes, the manifest says {record.bytes:,}"
            wrong[record.name] = f"{place.uri} is damaged: {told}"
    return manifest, wrong


def whole_manifest(checkpoint: Location) -> Part:
    """The manifest of a checkpoint whose files all have the bytes that it says.

    Raises:
        NotFound, Damaged, BadInput: as `read_listed`, or a file is missing or has another size.
    """
    manifest, wrong = read_listed(checkpoint)
    if wrong:
        raise Damaged("; ".join(wrong.values()))
    return manifest


def read_whole(checkpoint: Location) -> Part | None:
    """The manifest of a checkpoint whose files all have the bytes that it says, or None.

    Raises:
        BadInput: another version wrote it.
    """
    try:
        return whole_manifest(checkpoint)
    except (NotFound, Damaged):
        return None


def read_manifest(checkpoint: Location) -> tuple[FileRecord, ...] | None:
    """The files of a checkpoint, or None where the folder is not a complete one."""
    manifest = read_whole(checkpoint)
    return manifest.files if manifest else None
