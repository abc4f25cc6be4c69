"""Checks what a checkpoint's files hold against its manifest: what is not as written is damaged."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from cat_ray.checkpoint.layout import (
    FLOAT_BYTES,
    FOLDER_FORM,
    STATE,
    State,
    images_of,
    parse_state,
    read_listed,
)
from cat_ray.checkpoint.records import NO_MORE_KEYS, Count, FileRecord, Part, Size, first_problem
from cat_ray.errors import Damaged, NotFound
from cat_ray.storage import Location

READERS = 8
# Safetensors: a file begins with its header's length in so many bytes; the header is JSON.
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
METADATA = "__metadata__"


@dataclass(frozen=True)
class _Held:
    """A tensor in a safetensors header, as `checkpoint/write.py` saves it."""

    __pydantic_config__ = NO_MORE_KEYS

    dtype: Literal["F32"]
    shape: tuple[Size]
    data_offsets: tuple[Count, Count]


_HEADER = TypeAdapter(dict[str, _Held | dict[str, str]])


def verify(checkpoint: Location) -> list[str]:
    """Hashes every file and checks what it holds; a line for each problem, none if all is sound.

    Raises:
        StorageDown: a file can't be read now: nothing is known of it.
        BadInput: a file may not be read, or another version wrote the checkpoint.
    """
    try:
        manifest, wrong = read_listed(checkpoint)
    except (NotFound, Damaged) as error:
        return [str(error)]
    lengths = lengths_by_file(manifest)

    def problem(record: FileRecord) -> str | None:
        if record.name in wrong:
            return wrong[record.name]
        try:
            if record.name == STATE:
                read_sound_state(checkpoint, record)
            else:
                read_sound_slices(checkpoint, record, lengths[record.name])
        except (NotFound, Damaged) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(READERS) as pool:
        return [line for line in pool.map(problem, manifest.files) if line]


def lengths_by_file(manifest: Part) -> dict[str, dict[str, int]]:
    """How many elements of each tensor lie in each file with slices."""
    found: dict[str, dict[str, int]] = {record.name: {} for record in manifest.files}
    for piece in manifest.slices:
        found[piece.file][piece.tensor] = piece.length
    return found


def read_sound_state(checkpoint: Location, record: FileRecord) -> State:
    """A checkpoint's state.

    Raises:
        Damaged: it is not the one that was written, or not this checkpoint's.
    """
    content, place = _read_hashed(checkpoint, record), checkpoint / record.name
    try:
        state = parse_state(content)
    except ValueError as error:
        raise Damaged(f"{place.uri} is damaged: {error}") from error
    # A copy may have any name.
    own = FOLDER_FORM.fullmatch(checkpoint.name) is not None
    if own and state.images != images_of(checkpoint.name):
        raise Damaged(f"{place.uri} is damaged: it is the state at {state.images:,} images")
    return state


def read_sound_slices(
    checkpoint: Location, record: FileRecord, lengths: Mapping[str, int]
) -> bytes:
    """The content of a file with slices.

    Args:
        checkpoint: the folder.
        record: the file in the manifest.
        lengths: the elements of each tensor in it.

    Raises:
        Damaged: it is not what was written, or not what the manifest says of it.
    """
    content = _read_hashed(checkpoint, record)
    try:
        check_header(content, lengths)
    except ValueError as error:
        raise Damaged(f"{checkpoint.uri}/{record.name} is damaged: {error}") from error
    return content


def check_header(content: bytes, lengths: Mapping[str, int]) -> None:
    """Make sure that a safetensors file holds these flat fp32 tensors, and nothing else.

    Raises:
        ValueError: it doesn't.
    """
    begin = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    if begin > min(len(content), LENGTH_BYTES + MAX_HEADER_BYTES):
        raise ValueError("its header is cut off")
    header = content[LENGTH_BYTES:begin]
    if not header.startswith(b"{"):
        raise ValueError("it has no header")
    try:
        held = _HEADER.validate_json(header, strict=True)
    except ValidationError as error:
        raise ValueError(f"its header: {first_problem(error)}") from error
    tensors = {name: entry for name, entry in held.items() if isinstance(entry, _Held)}
    if tensors.keys() != held.keys() - {METADATA}:
        raise ValueError("its header has something that is no tensor")
    if {name: entry.shape[0] for name, entry in tensors.items()} != dict(lengths):
        raise ValueError("its tensors are not those of the manifest")
    end = 0
    for entry in sorted(tensors.values(), key=lambda entry: entry.data_offsets):
        if entry.data_offsets != (end, end + FLOAT_BYTES * entry.shape[0]):
            raise ValueError("its tensors have gaps or overlaps")
        end = entry.data_offsets[1]
    if end != len(content) - begin:
        raise ValueError("its tensors don't fill it")


def _read_hashed(checkpoint: Location, record: FileRecord) -> bytes:
    content = (checkpoint / record.name).read()
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise Damaged(
            f"{checkpoint.uri}/{record.name} is damaged: its sha256 is not the manifest's"
        )
    return content
