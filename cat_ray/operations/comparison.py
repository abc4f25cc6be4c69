"""Two runs that must be the same but for what befell one of them, compared in all that counts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table

from cat_ray.checkpoint.read import CheckpointReader, newest_sound
from cat_ray.config import Config
from cat_ray.errors import RunFailed
from cat_ray.operations.goodput import Row, read_ledger
from cat_ray.operations.sample_keys import Trained, trained_on
from cat_ray.storage import Location

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


def tolerance(config: Config) -> float:
    """What may differ, absolutely up to 1 and relatively above, where group sizes differed."""
    rates = (
        config.optimisation.generator.rate(config.model.generator.dimensions().width),
        config.optimisation.discriminator.rate(config.model.discriminator.dimensions().width),
    )
    return (
        SHARE_OF_THE_WAY * (config.run.total_images // config.optimisation.batch_size) * max(rates)
    )


def starts_of(rows: list[Row]) -> list[tuple[str, int]]:
    """The worker groups of a ledger in order of time, each with the images it went on from."""
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row.at, row.images), reverse=True):
        first[row.group] = row
    return [(row.group, row.images) for row in sorted(first.values(), key=lambda row: row.began)]


def compare(
    name: str, undisturbed: Location, disturbed: Location, allowed: float | None
) -> Iterator[Compared]:
    """Images seen, samples, noise, and every group of tensors of the newest checkpoints.

    Args:
        name: of the disturbed run.
        undisturbed: a run's folder.
        disturbed: another's.
        allowed: how far tensors may differ; None means not by a bit.

    Raises:
        RunFailed: one of them has no whole checkpoint.
    """
    yield from compare_input(name, undisturbed, disturbed)
    before, after = _reader(undisturbed), _reader(disturbed)
    for group in sorted({piece.group for piece in before.manifest.slices}):
        difference = _difference(before.tensors(group), after.tensors(group))
        words = "none, bit for bit" if allowed is None else f"{allowed:.1e}"
        same = difference <= (allowed or 0.0)
        yield Compared(name, group, f"difference {difference:.1e}", words, same)


def compare_input(name: str, undisturbed: Location, disturbed: Location) -> Iterator[Compared]:
    """Only images seen, samples and noise: what is the same however far rounding has grown.

    Raises:
        RunFailed: one of them has no whole checkpoint.
    """
    images = _reader(undisturbed).state.images, _reader(disturbed).state.images
    yield Compared(name, "images seen", f"{images[1]:,}", f"{images[0]:,}", images[0] == images[1])
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


def _reader(run: Location) -> CheckpointReader:
    checkpoint = newest_sound(run)
    if checkpoint is None:
        raise RunFailed(f"{run.uri} has no whole checkpoint")
    return CheckpointReader(checkpoint)


def _input(run: Location) -> Trained:
    return trained_on(run, starts_of(read_ledger(run)))


def _difference(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """The largest, absolute up to 1 and relative above; infinite where names or shapes differ."""
    if {n: v.shape for n, v in before.items()} != {n: v.shape for n, v in after.items()}:
        return float("inf")
    differences = [
        float(((after[name] - value) / value.abs().clamp(min=1)).abs().max())
        for name, value in before.items()
    ]
    # A comparison with NaN is false: max would pass over it.
    return float("inf") if any(map(math.isnan, differences)) else max(differences)


def comparison_tables(compared: list[Compared]) -> Iterator[Table]:
    """What was compared, for a person: a table for each disturbed run."""
    for run in dict.fromkeys(row.run for row in compared):
        table = Table("", "found", "allowed", "", title=run, title_justify="left")
        for row in compared:
            if row.run == run:
                mark = "[green]pass[/green]" if row.same else "[red]FAIL[/red]"
                table.add_row(row.what, row.measured, row.allowed, mark)
        yield table
