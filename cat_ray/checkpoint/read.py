"""Finds the newest complete checkpoint and reads it."""

import hashlib
import json

import safetensors.torch
import torch
from torch import Tensor

from cat_ray.checkpoint.layout import (
    FOLDER,
    GENERATOR,
    STATE,
    State,
    average_file,
    read_manifest,
)
from cat_ray.config import Config, parse
from cat_ray.errors import BadInput
from cat_ray.model.build import build_generator
from cat_ray.model.generator import Generator
from cat_ray.storage import Location


def newest(run: Location) -> Location | None:
    """The newest complete checkpoint of a run folder, or None."""
    folders = (run / FOLDER).folders()
    return next((folder for folder in reversed(folders) if read_manifest(folder)), None)


def resolve(place: Location) -> Location:
    """The checkpoint that a folder is, or the newest one of the run that it is.

    Raises:
        BadInput: it is neither, or the checkpoint is not complete.
    """
    found = place if read_manifest(place) is not None else newest(place)
    if found is None:
        raise BadInput(f"{place.uri} is neither a complete checkpoint nor a run that has one")
    return found


def read_state(checkpoint: Location) -> State:
    """The checkpoint's state.

    Raises:
        BadInput: the file is not what the manifest says.
    """
    return State(**json.loads(_verified(checkpoint, STATE)))


def read_config(checkpoint: Location) -> Config:
    """The configuration that the checkpoint was trained with."""
    return parse(read_state(checkpoint).config, (checkpoint / STATE).uri)


def read_tensors(checkpoint: Location, name: str) -> dict[str, Tensor]:
    """The tensors of one file, by name.

    Raises:
        BadInput: the file is not what the manifest says, or no safetensors file.
    """
    return safetensors.torch.load(_verified(checkpoint, name))


def load_generator(
    checkpoint: Location, decay: float | None = None, device: torch.device | None = None
) -> Generator:
    """The generator of a checkpoint, ready to sample: its first average, or one by its decay.

    A decay of 0 gives the raw weights.
    """
    config = read_config(checkpoint)
    decay = config.optimisation.ema_decays[0] if decay is None else decay
    generator = build_generator(config)
    weights = read_tensors(checkpoint, average_file(decay) if decay else GENERATOR)
    generator.load_state_dict(weights)
    return generator.eval().requires_grad_(False).to(device or torch.device("cpu"))


def _verified(checkpoint: Location, name: str) -> bytes:
    records = {record.name: record for record in read_manifest(checkpoint) or ()}
    if name not in records:
        raise BadInput(f"{checkpoint.uri} has no {name}, it has {', '.join(sorted(records))}")
    content = (checkpoint / name).read()
    if hashlib.sha256(content).hexdigest() != records[name].sha256:
        raise BadInput(f"{checkpoint.uri}/{name} is damaged: its sha256 is not the manifest's")
    return content
