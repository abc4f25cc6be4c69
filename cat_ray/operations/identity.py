"""Whose run a folder is: a run goes on only under the configuration that it began with."""

from typing import Any

from cat_ray.config import Config, dump, flatten, parse
from cat_ray.errors import BadInput
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
    first, second = flatten(a), flatten(b)
    return [
        f"{name} is {_show(first.get(name))} there, {_show(second.get(name))} here"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name) and not _is_free(name)
    ]


def claim(run: Location, config: Config, data_digest: str) -> None:
    """Makes the folder this run's, or makes sure that it is.

    Raises:
        BadInput: it belongs to another configuration or to other data, or holds something else.
    """
    place = run / CONFIG_NAME
    if place.exists():
        changed = differences(parse(place.read().decode(), place.uri), config)
        known = (run / DATA_NAME).read().decode() if (run / DATA_NAME).exists() else data_digest
        if known != data_digest:
            changed.append("the shards hold other samples")
        if changed:
            raise BadInput(
                f"{run.uri} belongs to another configuration ({'; '.join(changed)}): "
                "choose another run.folder, or restore these values"
            )
    elif run.sizes() or run.folders():
        raise BadInput(f"{run.uri} isn't empty and holds no run: choose another run.folder")
    place.write(dump(config).encode())
    (run / DATA_NAME).write(data_digest.encode())


def _is_free(name: str) -> bool:
    return any(name.startswith(key) if key.endswith(".") else name == key for key in FREE)


def _show(value: Any) -> str:
    return "unset" if value is None else str(value)
