"""What a run's networks begin as, where they go on from a checkpoint of another run."""

import torch
from torch import Tensor

from cat_ray.checkpoint.layout import (
    DISCRIMINATOR,
    FOLDER,
    GENERATOR,
    STATE,
    Part,
    average_group,
    read_whole,
)
from cat_ray.checkpoint.read import CheckpointReader, newest, newest_sound, resolve, verify
from cat_ray.checkpoint.transfer import Shapes, Transfer, applied, transfer
from cat_ray.config import Config, parse
from cat_ray.errors import BadInput
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.operations.identity import CONFIG_NAME
from cat_ray.storage import Location


def pinned(config: Config, run: Location) -> Config:
    """The same job with one checkpoint in `run.initialise_from`, the same one at every call.

    The run's folder keeps its name: where a run's folder was given that has a newer one by now, a
    killed run nevertheless begins as it began before.

    Raises:
        BadInput: there is no sound checkpoint.
    """
    given = config.run.initialise_from
    if given is None:
        return config
    place, known = _located(config, given), None
    if (run / CONFIG_NAME).exists():
        resolved = (run / CONFIG_NAME).read().decode()
        known = parse(resolved, (run / CONFIG_NAME).uri).run.initialise_from
    if known is None or not (known == place.uri or known.startswith(f"{place.uri}/{FOLDER}/")):
        known = _sound(place).uri
    return config.model_copy(
        update={"run": config.run.model_copy(update={"initialise_from": known})}
    )


def check_beginning(config: Config, run: Location) -> bool:
    """Whether a run is to begin with weights of another, having no checkpoint yet.

    Raises:
        BadInput: it is, but it can't, or there is no checkpoint.
    """
    begins = config.run.initialise_from is not None and newest(run) is None
    if begins:
        rules(config)
    return begins


def rules(config: Config) -> Transfer:
    """The rules by which a job goes on from `run.initialise_from`.

    Raises:
        BadInput: it can't, or there is no checkpoint.
    """
    assert config.run.initialise_from is not None
    return _rules(config, CheckpointReader(resolve(_located(config, config.run.initialise_from))))


def rules_between(old: Config, new: Config) -> Transfer:
    """The rules by which a job goes on from another that may not have been trained yet.

    Raises:
        BadInput: it can't.
    """
    return transfer(old, new, shapes_of(old), shapes_of(new))


def initial_weights(config: Config) -> dict[str, dict[str, Tensor]]:
    """The tensors that a run begins with, by group and name, but those that begin at random.

    Raises:
        BadInput: the job can't go on from the checkpoint, or a file of it is damaged.
    """
    assert config.run.initialise_from is not None
    reader = CheckpointReader(resolve(_located(config, config.run.initialise_from)))
    made: dict[str, dict[str, Tensor]] = {}
    old: dict[str, dict[str, Tensor]] = {}
    for rule in _rules(config, reader).rules:
        if rule.source is not None:
            if rule.source not in old:
                old[rule.source] = reader.tensors(rule.source)
            values = applied(rule, old[rule.source][rule.tensor])
            made.setdefault(rule.group, {})[rule.tensor] = values
    return made


def shapes_of(config: Config) -> Shapes:
    """The shapes of a job's tensors, by group and name."""
    with torch.device("meta"):
        generator, discriminator = build_generator(config), build_discriminator(config)
    groups = {GENERATOR: generator, DISCRIMINATOR: discriminator}
    groups |= {average_group(decay): generator for decay in config.optimisation.ema_decays}
    return {
        group: {name: tuple(value.shape) for name, value in network.state_dict().items()}
        for group, network in groups.items()
    }


def _rules(config: Config, reader: CheckpointReader) -> Transfer:
    old = parse(reader.state.config, (reader.checkpoint / STATE).uri)
    try:
        return transfer(old, config, _stored_shapes(reader.manifest), shapes_of(config))
    except BadInput as error:
        raise BadInput(f"{reader.checkpoint.uri}: {error}") from error


def _stored_shapes(manifest: Part) -> Shapes:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for piece in manifest.slices:
        shapes.setdefault(piece.group, {})[piece.tensor] = piece.shape
    return shapes


def _located(config: Config, uri: str) -> Location:
    return config.storage.locate(uri)


def _sound(place: Location) -> Location:
    if read_whole(place) is not None:
        if damaged := verify(place):
            raise BadInput(f"{'; '.join(damaged)}: begin from another checkpoint")
        return place
    # Says what is wrong with a folder that is no run's.
    resolve(place)
    found = newest_sound(place)
    if found is None:
        raise BadInput(f"every checkpoint in {place.uri} is damaged: begin from another run")
    return found
