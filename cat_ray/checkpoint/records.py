"""The records of what was written: a worker's part, and the manifest that joins all parts."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from cat_ray.errors import BadInput
from cat_ray.json_text import parse_object

FORMAT = 2
# More than PyTorch's tensors of ours have.
MAX_DIMENSIONS = 16
LONGEST_SHOWN = 200

# Bounded, as JSON's numbers are not: more than any file or tensor has.
Count = Annotated[int, Field(strict=True, ge=0, le=2**62)]
Size = Annotated[int, Field(strict=True, ge=1, le=2**62)]
NO_MORE_KEYS = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint: bytes and sha256."""

    __pydantic_config__ = NO_MORE_KEYS

    name: str
    bytes: Count
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
class _Tensor:
    """A tensor in a part: its shape, and each slice's file, offset and length."""

    __pydantic_config__ = NO_MORE_KEYS

    shape: Annotated[tuple[Size, ...], Field(max_length=MAX_DIMENSIONS)]
    slices: Annotated[tuple[tuple[str, Count, Size], ...], Field(min_length=1)]


_FILES = TypeAdapter(tuple[FileRecord, ...])
_TENSORS = TypeAdapter(dict[str, dict[str, _Tensor]])


def parse_part(content: bytes) -> Part:
    """Parse a part or a manifest from its file's content.

    Raises:
        ValueError: it is not as it was written, or says what can't be.
        BadInput: it was written by a version with another format.
    """
    try:
        values = parse_object(content)
        digest, found = values.pop("sha256", None), values.get("format")
        if type(found) is not int:
            raise ValueError("it has no format")
        if digest != _digest(values) and (digest is not None or found == FORMAT):
            raise ValueError("its content does not have the sha256 in it")
        if found == FORMAT:
            files = _FILES.validate_python(values.get("files"))
            groups = _TENSORS.validate_python(values.get("tensors"))
            slices = tuple(_slices(groups))
            if not all(
                piece.group.isprintable() and piece.tensor.isprintable() for piece in slices
            ):
                raise ValueError("it names a tensor with characters that can't be printed")
            return Part(files, slices)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error
    raise BadInput(f"a checkpoint has format {found}, this version reads {FORMAT}")


def join(parts: Iterable[Part]) -> Part:
    """All workers' parts as one manifest.

    Raises:
        ValueError: together they don't hold each element of each tensor exactly once.
    """
    parts = list(parts)
    files = {record.name: record for part in parts for record in part.files}
    slices = sorted((piece for part in parts for piece in part.slices), key=_order)
    check_coverage(slices)
    return Part(tuple(sorted(files.values(), key=lambda record: record.name)), tuple(slices))


def check_coverage(slices: Iterable[SliceRecord]) -> None:
    """Make sure that slices hold each element of each tensor exactly once.

    Raises:
        ValueError: they don't, with the first tensor that isn't held so.
    """
    for (group, tensor), held in groupby(sorted(slices, key=_order), lambda s: _order(s)[:2]):
        pieces, end = list(held), 0
        for piece in pieces:
            if piece.offset != end:
                raise ValueError(f"{group}: {tensor} has a gap or an overlap")
            end += piece.length
        shapes = {piece.shape for piece in pieces}
        if len(shapes) > 1 or end != math.prod(pieces[0].shape):
            raise ValueError(f"{group}: {tensor} is not whole")


def first_problem(error: ValidationError) -> str:
    """What is wrong with a file's content, in a few words, after where in it."""
    first = error.errors(include_url=False, include_input=False)[0]
    # Foreign keys are among the steps: whatever they are, a message is one line.
    place = ".".join(repr(str(step))[1:-1] for step in first["loc"])[:LONGEST_SHOWN]
    return f"{place}: {first['msg']}" if place else first["msg"]


def _digest(values: dict) -> str:
    """The sha256 of a part, which it carries itself."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _slices(groups: dict[str, dict[str, _Tensor]]) -> Iterator[SliceRecord]:
    for group, tensors in groups.items():
        for tensor, entry in tensors.items():
            for file, offset, length in entry.slices:
                yield SliceRecord(group, tensor, entry.shape, offset, length, file)


def _order(piece: SliceRecord) -> tuple[str, str, int]:
    return piece.group, piece.tensor, piece.offset
