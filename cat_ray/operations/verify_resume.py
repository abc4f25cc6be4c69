"""`cat-ray verify-resume`: trains a few steps undisturbed, then again with kills and with resizes.

What must come out the same is compared: images seen, samples, noise, weights, averages, moments.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table

from cat_ray.checkpoint.read import CheckpointReader, newest_sound
from cat_ray.config import Config
from cat_ray.errors import RunFailed
from cat_ray.operations.drill import starts_of
from cat_ray.operations.goodput import read_ledger
from cat_ray.operations.sample_keys import Trained, trained_on
from cat_ray.storage import Location, locate
from cat_ray.training.driver import cluster, train
from cat_ray.training.faults import Fault

SAVES = 4
STEPS_BETWEEN_SAVES = 3
# With other numbers of workers the same gradients are added up in another order. Adam divides a
# gradient by its own size, so that a rounding error of a tiny one is worth a share of a step: the
# tolerance is this share of the way that a weight can have gone, steps x learning rate.
SHARE_OF_THE_WAY = 0.01


@dataclass(frozen=True)
class Compared:
    """One thing that must be the same in a disturbed run.

    Attributes:
        run: which run was disturbed, and how.
        what: what is compared.
        measured: what was found, in words.
        allowed: what may be found, in words.
        same: whether it is.
    """

    run: str
    what: str
    measured: str
    allowed: str
    same: bool


def verify_resume(config: Config) -> list[Compared]:
    """Trains the job's first steps three times, in folders beside the run's, and compares.

    Raises:
        BadInput: the job can't be used, or one of the folders isn't empty.
    """
    batch = config.optimisation.batch_size
    apart = STEPS_BETWEEN_SAVES * batch
    total = SAVES * apart
    largest = min(config.workers.maximum + 1, config.optimisation.lanes)
    config = config.model_copy(
        update={
            "checkpoints": config.checkpoints.model_copy(
                update={"save_every_images": apart, "keep": SAVES}
            ),
            "reporting": config.reporting.model_copy(
                update={
                    "sample_keys": True,
                    "grid_every_images": total,
                    "log_every_images": apart,
                    "trackers": (),
                }
            ),
            "evaluation": config.evaluation.model_copy(update={"protocol": "none"}),
        }
    )
    workers = config.workers.maximum
    kills = tuple(Fault("kill", save * apart + batch, save % workers) for save in range(1, SAVES))
    sizes = [workers, 1, largest, workers]
    with cluster(_part(config, "largest", total, largest)):
        undisturbed = _trained(_part(config, "undisturbed", total, workers))
        killed = _trained(_part(config, "killed", total, workers), kills)
        for save, size in enumerate(sizes, start=1):
            resized = _trained(_part(config, "resized", save * apart, size))
    told = "-".join(map(str, sizes))
    rates = (
        config.optimisation.generator.rate(config.model.generator.dimensions().width),
        config.optimisation.discriminator.rate(config.model.discriminator.dimensions().width),
    )
    way = SHARE_OF_THE_WAY * (total // batch) * max(rates)
    return [
        *_compare(f"{len(kills)} kills, {workers} workers", undisturbed, killed, None),
        *_compare(f"{told} workers", undisturbed, resized, way),
    ]


def comparison_tables(compared: list[Compared]) -> Iterator[Table]:
    """What was compared, for a person: a table for each disturbed run."""
    for run in dict.fromkeys(row.run for row in compared):
        table = Table("", "found", "allowed", "", title=run, title_justify="left")
        for row in compared:
            if row.run == run:
                mark = "[green]pass[/green]" if row.same else "[red]FAIL[/red]"
                table.add_row(row.what, row.measured, row.allowed, mark)
        yield table


def _part(config: Config, name: str, total_images: int, workers: int) -> Config:
    return config.model_copy(
        update={
            "run": config.run.model_copy(
                update={
                    "folder": f"{config.run.folder}-verify-resume/{name}",
                    "total_images": total_images,
                }
            ),
            "workers": config.workers.model_copy(
                update={"minimum": workers, "maximum": workers, "max_failures": SAVES}
            ),
        }
    )


def _trained(config: Config, faults: tuple[Fault, ...] = ()) -> Location:
    run = locate(config.run.folder, config.storage.endpoint_url, config.storage.region)
    train(config, faults)
    return run


def _compare(
    name: str, undisturbed: Location, disturbed: Location, tolerance: float | None
) -> Iterator[Compared]:
    pair = []
    for run in (undisturbed, disturbed):
        checkpoint = newest_sound(run)
        if checkpoint is None:
            raise RunFailed(f"{run.uri} has no whole checkpoint")
        pair.append(CheckpointReader(checkpoint))
    before, after = pair
    images = before.state.images, after.state.images
    yield Compared(name, "images seen", f"{images[1]:,}", f"{images[0]:,}", images[0] == images[1])
    yield from _compare_input(name, undisturbed, disturbed)
    groups = sorted({piece.group for piece in before.manifest.slices})
    for group in groups:
        difference = _difference(before.tensors(group), after.tensors(group))
        allowed = 0.0 if tolerance is None else tolerance
        words = "none, bit for bit" if tolerance is None else f"{allowed:.1e}"
        yield Compared(name, group, f"difference {difference:.1e}", words, difference <= allowed)


def _compare_input(name: str, undisturbed: Location, disturbed: Location) -> Iterator[Compared]:
    expected = _input(undisturbed)
    try:
        found = _input(disturbed)
    except ValueError as error:
        yield Compared(name, "samples", str(error), "each once, in order", False)
        return
    same = sum(a == b for a, b in zip(expected.keys, found.keys, strict=False))
    yield Compared(
        name,
        "samples",
        f"{same:,} of {len(expected.keys):,} the same",
        "all, in order",
        expected.keys == found.keys,
    )
    noise = expected.noise == found.noise
    yield Compared(name, "random streams", "the same" if noise else "others", "the same", noise)


def _input(run: Location) -> Trained:
    return trained_on(run, starts_of(read_ledger(run)))


def _difference(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """The largest, absolute up to 1 and relative above; infinite where names or shapes differ."""
    if {n: v.shape for n, v in before.items()} != {n: v.shape for n, v in after.items()}:
        return float("inf")
    return max(
        float(((after[name] - value) / value.abs().clamp(min=1)).abs().max())
        for name, value in before.items()
    )
