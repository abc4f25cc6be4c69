"""Finds the newest complete checkpoint and reads it."""

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import safetensors.torch
import torch
from torch import Tensor

from cat_ray.checkpoint.layout import (
    DAMAGED,
    FOLDER,
    GENERATOR,
    MANIFEST,
    STATE,
    FileRecord,
    Part,
    State,
    average_group,
    parse_part,
    read_whole,
)
from cat_ray.config import Config, parse
from cat_ray.errors import BadInput
from cat_ray.model.build import build_generator
from cat_ray.model.generator import Generator
from cat_ray.schedule import check_has_no_phases
from cat_ray.storage import Location

READERS = 8

logger = logging.getLogger(__name__)


def complete(run: Location) -> Iterator[Location]:
    """The complete checkpoints of a run folder, newest first."""
    for folder in reversed((run / FOLDER).folders()):
        if read_whole(folder) is not None:
            yield folder


def newest(run: Location) -> Location | None:
    """The newest complete checkpoint of a run folder, or None."""
    return next(complete(run), None)


def any_committed(run: Location) -> bool:
    """Whether a run folder has checkpoints that were complete once, damaged or not."""
    return any((folder / MANIFEST).exists() for folder in (run / FOLDER).folders())


def newest_sound(run: Location) -> Location | None:
    """The newest checkpoint in which every file has its sha256, or None.

    The damaged files of one that was committed are named in a warning; it is passed over, and
    marked, so that it takes no place among those that are kept.
    """
    for checkpoint in reversed((run / FOLDER).folders()):
        if not (checkpoint / MANIFEST).exists():
            continue
        damaged = verify(checkpoint)
        if not damaged:
            return checkpoint
        logger.warning("%s; this checkpoint is passed over", "; ".join(damaged))
        (checkpoint / DAMAGED).write("\n".join(damaged).encode())
    return None


def verify(checkpoint: Location) -> list[str]:
    """Hashes every file; a line for each that is not what the manifest says, none if all are."""
    place = checkpoint / MANIFEST
    if not place.exists():
        return [f"{checkpoint.uri} is not a complete checkpoint: it has no {MANIFEST}"]
    manifest = parse_part(place.read())
    if manifest is None:
        return [f"{place.uri} is damaged"]

    def problem(record: FileRecord) -> str | None:
        try:
            _verified(checkpoint, record)
        except BadInput as error:
            return str(error)
        return None

    with ThreadPoolExecutor(READERS) as pool:
        return [line for line in pool.map(problem, manifest.files) if line]


def resolve(place: Location) -> Location:
    """The checkpoint that a folder is, or the newest one of the run that it is.

    Raises:
        BadInput: it is neither, or the checkpoint is not complete.
    """
    found = place if read_whole(place) is not None else newest(place)
    if found is None:
        check_has_no_phases(place)
        raise BadInput(f"{place.uri} is neither a complete checkpoint nor a run that has one")
    return found


class CheckpointReader:
    """Reads tensors of a checkpoint, whole or in part, whoever wrote which slice of them.

    Each file is read once, checked against its sha256, and kept until the reader goes.
    """

    def __init__(self, checkpoint: Location):
        self.checkpoint = checkpoint
        self._files: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def manifest(self) -> Part:
        """What the checkpoint holds.

        Raises:
            BadInput: it is not complete.
        """
        manifest = read_whole(self.checkpoint)
        if manifest is None:
            raise BadInput(f"{self.checkpoint.uri} is not a complete checkpoint")
        return manifest

    @cached_property
    def state(self) -> State:
        """Images seen, configuration and versions."""
        return State(**json.loads(_verified(self.checkpoint, self._record(STATE))))

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The full tensors of a group, by name.

        Raises:
            BadInput: there is no such group, or a file is damaged.
        """
        full: dict[str, Tensor] = {}
        for piece in self.manifest.slices:
            if piece.group == group:
                values = self._file(piece.file)[piece.tensor]
                if piece.tensor not in full:
                    full[piece.tensor] = torch.empty(piece.shape, dtype=values.dtype)
                flat = full[piece.tensor].view(-1)
                flat[piece.offset : piece.offset + piece.length] = values
        if not full:
            groups = sorted({piece.group for piece in self.manifest.slices})
            raise BadInput(f"{self.checkpoint.uri} has no {group}, it has {', '.join(groups)}")
        return full

    def run(self, group: str, tensor: str, offset: int, length: int) -> Tensor:
        """Elements `offset` to `offset + length` of a flattened tensor; zeros past its end."""
        found = torch.zeros(length)
        for piece in self._by_tensor.get((group, tensor), ()):
            first = max(offset, piece.offset)
            beyond = min(offset + length, piece.offset + piece.length)
            if first < beyond:
                values = self._file(piece.file)[tensor]
                found[first - offset : beyond - offset] = values[
                    first - piece.offset : beyond - piece.offset
                ]
        return found

    @cached_property
    def _by_tensor(self) -> dict[tuple[str, str], list]:
        found: dict[tuple[str, str], list] = {}
        for piece in self.manifest.slices:
            found.setdefault((piece.group, piece.tensor), []).append(piece)
        return found

    def _file(self, name: str) -> dict[str, Tensor]:
        if name not in self._files:
            content = _verified(self.checkpoint, self._record(name))
            self._files[name] = safetensors.torch.load(content)
        return self._files[name]

    def _record(self, name: str) -> FileRecord:
        return next(record for record in self.manifest.files if record.name == name)


def read_state(checkpoint: Location) -> State:
    """The checkpoint's state.

    Raises:
        BadInput: the file is not what the manifest says.
    """
    return CheckpointReader(checkpoint).state


def read_config(checkpoint: Location) -> Config:
    """The configuration that the checkpoint was trained with."""
    return parse(read_state(checkpoint).config, (checkpoint / STATE).uri)


def read_tensors(checkpoint: Location, group: str) -> dict[str, Tensor]:
    """The full tensors of one group, by name.

    Raises:
        BadInput: there is no such group, or a file is damaged.
    """
    return CheckpointReader(checkpoint).tensors(group)


def load_generator(
    checkpoint: Location, decay: float | None = None, device: torch.device | None = None
) -> Generator:
    """The generator of a checkpoint, ready to sample: its first average, or one by its decay.

    A decay of 0 gives the raw weights.
    """
    reader = CheckpointReader(checkpoint)
    config = parse(reader.state.config, (checkpoint / STATE).uri)
    decay = config.optimisation.ema_decays[0] if decay is None else decay
    generator = build_generator(config)
    generator.load_state_dict(reader.tensors(average_group(decay) if decay else GENERATOR))
    return generator.eval().requires_grad_(False).to(device or torch.device("cpu"))


def _verified(checkpoint: Location, record: FileRecord) -> bytes:
    content = (checkpoint / record.name).read()
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise BadInput(
            f"{checkpoint.uri}/{record.name} is damaged: its sha256 is not the manifest's"
        )
    return content
