"""Finds the newest complete checkpoint and reads it."""

import logging
from collections.abc import Iterator
from functools import cached_property

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cat_ray.checkpoint.contents import (
    lengths_by_file,
    read_sound_slices,
    read_sound_state,
    verify,
)
from cat_ray.checkpoint.layout import (
    DAMAGED,
    GENERATOR,
    MANIFEST,
    STATE,
    State,
    average_group,
    checkpoint_folders,
    read_whole,
    whole_manifest,
)
from cat_ray.checkpoint.records import FileRecord, Part, SliceRecord
from cat_ray.config import Config, parse
from cat_ray.errors import BadInput, Damaged, ExpectedError
from cat_ray.model.build import build_generator
from cat_ray.model.generator import Generator
from cat_ray.schedule import check_has_no_phases
from cat_ray.storage import Location

logger = logging.getLogger(__name__)


def complete(run: Location) -> Iterator[Location]:
    """The complete checkpoints of a run folder, newest first."""
    for folder in reversed(checkpoint_folders(run)):
        if read_whole(folder) is not None:
            yield folder


def newest(run: Location) -> Location | None:
    """The newest complete checkpoint of a run folder, or None."""
    return next(complete(run), None)


def any_committed(run: Location) -> bool:
    """Whether a run folder has checkpoints that were complete once, damaged or not."""
    return any((folder / MANIFEST).exists() for folder in checkpoint_folders(run))


def newest_sound(run: Location) -> Location | None:
    """The newest checkpoint in which `verify` finds nothing wrong, or None.

    The damaged files of one that was committed are named in a warning; it is passed over, and
    marked, so that it takes no place among those that are kept.

    Raises:
        StorageDown: a checkpoint can't be read now. An older one would lose work.
        BadInput: one may not be read, or another version wrote it.
    """
    for checkpoint in reversed(checkpoint_folders(run)):
        sizes = checkpoint.sizes()
        if MANIFEST not in sizes:
            continue
        damaged = verify(checkpoint)
        if not damaged:
            if DAMAGED in sizes:
                # By a judgement that was wrong, or of a file that was restored since.
                _mark(checkpoint, damaged)
            return checkpoint
        # Else it was deleted in the meantime.
        if (checkpoint / MANIFEST).exists():
            logger.warning("%s; this checkpoint is passed over", "; ".join(damaged))
            _mark(checkpoint, damaged)
    return None


def resolve(place: Location) -> Location:
    """The checkpoint that a folder is, or the newest one of the run that it is.

    Raises:
        BadInput: it is neither, or the checkpoint is not complete.
    """
    if (place / MANIFEST).exists():
        whole_manifest(place)
        return place
    found = newest(place)
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
            BadInput: it is not complete, or damaged.
        """
        return whole_manifest(self.checkpoint)

    @cached_property
    def state(self) -> State:
        """Images seen, configuration and versions.

        Raises:
            BadInput: the checkpoint is not complete, or damaged.
        """
        return read_sound_state(self.checkpoint, self._record(STATE))

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
                    # The manifest was checked: its slices cover every element.
                    full[piece.tensor] = torch.empty(piece.shape, dtype=values.dtype)
                flat = full[piece.tensor].view(-1)
                flat[piece.offset : piece.offset + piece.length] = values
        if not full:
            groups = sorted({piece.group for piece in self.manifest.slices})
            raise BadInput(f"{self.checkpoint.uri} has no {group}, it has {', '.join(groups)}")
        return full

    def run(self, group: str, tensor: str, offset: int, length: int) -> Tensor:
        """Elements `offset` to `offset + length` of a flattened tensor; zeros past its end.

        Raises:
            BadInput: there is no such tensor, or a file is damaged.
        """
        if (group, tensor) not in self._by_tensor:
            raise Damaged(f"{self.checkpoint.uri} has no {group}: {tensor}")
        found = torch.zeros(length)
        pieces = self._by_tensor[group, tensor]
        if offset >= pieces[-1].offset + pieces[-1].length:
            # All is past the end: a file says whether the manifest is right about that.
            self._file(pieces[-1].file)
        for piece in pieces:
            first = max(offset, piece.offset)
            beyond = min(offset + length, piece.offset + piece.length)
            if first < beyond:
                values = self._file(piece.file)[tensor]
                found[first - offset : beyond - offset] = values[
                    first - piece.offset : beyond - piece.offset
                ]
        return found

    @cached_property
    def _by_tensor(self) -> dict[tuple[str, str], list[SliceRecord]]:
        found: dict[tuple[str, str], list[SliceRecord]] = {}
        for piece in self.manifest.slices:
            found.setdefault((piece.group, piece.tensor), []).append(piece)
        return found

    @cached_property
    def _lengths(self) -> dict[str, dict[str, int]]:
        return lengths_by_file(self.manifest)

    def _file(self, name: str) -> dict[str, Tensor]:
        if name not in self._files:
            content = read_sound_slices(self.checkpoint, self._record(name), self._lengths[name])
            try:
                self._files[name] = safetensors.torch.load(content)
            except SafetensorError as error:
                raise Damaged(f"{self.checkpoint.uri}/{name} is damaged: {error}") from error
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
    group = average_group(decay) if decay else GENERATOR
    generator, tensors = build_generator(config), reader.tensors(group)
    _check_shapes(checkpoint, group, generator.state_dict(), tensors)
    generator.load_state_dict(tensors)
    return generator.eval().requires_grad_(False).to(device or torch.device("cpu"))


def _check_shapes(
    checkpoint: Location, group: str, wanted: dict[str, Tensor], found: dict[str, Tensor]
) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape:
            raise Damaged(
                f"{checkpoint.uri}: {group}: {name} doesn't fit the network of the configuration "
                f"in {STATE}: restore the checkpoint from a copy, or take another"
            )


def _mark(checkpoint: Location, damaged: list[str]) -> None:
    """Notes what is damaged, for those who delete old checkpoints, or that nothing is."""
    place = checkpoint / DAMAGED
    try:
        if damaged:
            place.write("\n".join(damaged).encode())
        else:
            place.delete()
    except ExpectedError as error:
        # Only the number of checkpoints that are kept depends on it.
        logger.warning("the mark of a damaged checkpoint can't be changed: %s", error)
