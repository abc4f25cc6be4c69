"""Whose run a folder is: a run goes on only under the configuration that it began with."""

from collections.abc import Sequence
from typing import Any

from cat_ray.config import Config, dump, flatten, parse
from cat_ray.errors import BadInput
from cat_ray.folder_lock import is_lock
from cat_ray.storage import Location

CONFIG_NAME = "config.resolved.yaml"
DATA_NAME = "data.sha256"

# What may change from one call to the next without changing what is computed: keys, and sections
# with a dot at the end.
FREE = (
    "run.folder",
    "run.total_images",
    "storage.",
    "data.shards",
    "data.source",
    "data.max_broken_samples",
    "data.window_megabytes",
    "data.cache_folder",
    "data.cache_gigabytes",
    "objective.alignment.teacher",
    "optimisation.activation_checkpointing",
    "optimisation.reuse_generator_forward",
    "optimisation.micro_batch_lanes",
    "optimisation.compile",
    "optimisation.generator.zero_stage",
    "optimisation.generator.offload",
    "optimisation.discriminator.offload",
    "optimisation.discriminator.zero_stage",
    "workers.",
    "preemption.",
    "checkpoints.",
    "health.",
    "cost.",
    "reporting.",
    "evaluation.",
)


def differences(a: Config, b: Config) -> list[str]:
    """The keys, with both values, in which two configurations compute different things."""
    first, second = (_comparable(config) for config in (a, b))
    return [
        f"{name} is {_show(first.get(name))} there, {_show(second.get(name))} here"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name) and not _is_free(name)
    ]


def claim(run: Location, config: Config, data_digest: str) -> None:
    """Makes the folder this run's, or makes sure that it is.

    Raises:
        BadInput: as `check_claim`.
    """
    check_claim(run, config, data_digest)
    (run / CONFIG_NAME).write(dump(config).encode())
    (run / DATA_NAME).write(data_digest.encode())


def check_claim(run: Location, config: Config, data_digest: str) -> None:
    """Makes sure that a folder is this run's, or empty.

    Raises:
        BadInput: it belongs to another configuration or to other data, or holds something else.
    """
    place = run / CONFIG_NAME
    if place.exists():
        known = (run / DATA_NAME).read().decode() if (run / DATA_NAME).exists() else data_digest
        check_same(run, config, ["the shards hold other samples"] * (known != data_digest))
    elif run.folders() or not all(is_lock(name) for name in run.sizes()):
        raise BadInput(f"{run.uri} isn't empty and holds no run: choose another run.folder")


def check_same(run: Location, config: Config, others: Sequence[str] = ()) -> None:
    """Makes sure that a run's folder is of this configuration.

    Raises:
        BadInput: it is not, or there are `others`, differences found before.
    """
    place = run / CONFIG_NAME
    changed = [*differences(parse(place.read().decode(), place.uri), config), *others]
    if changed:
        raise BadInput(
            f"{run.uri} belongs to another configuration ({'; '.join(changed)}): "
            "choose another run.folder, or restore these values"
        )


def _comparable(config: Config) -> dict[str, Any]:
    # A run that began with other weights is another run; but the checkpoint that has them may lie
    # elsewhere by now, as shards and run may: by its name it is known.
    flat, key = flatten(config), "run.initialise_from"
    return flat | {key: flat[key] and flat[key].rstrip("/").rsplit("/", 1)[-1]}


def _is_free(name: str) -> bool:
    return any(name.startswith(key) if key.endswith(".") else name == key for key in FREE)


def _show(value: Any) -> str:
    return "unset" if value is None else str(value)
