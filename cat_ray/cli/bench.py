"""`cat-ray bench`: speed, as ratios of two things in one run."""

import contextlib
import sys
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cat_ray import config as configuration
from cat_ray.cli.shell import AsJson, Endpoint, Job, Overrides, app, speaking_plainly
from cat_ray.cpus import usable_cpus
from cat_ray.errors import BadInput
from cat_ray.storage import locate

CPUS_HELP = "Cores to use; all of this machine's if unset."

bench = typer.Typer(help="Measure speed, as ratios of two things in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("checkpoint")
def bench_checkpoint(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A new or empty folder.")],
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the state.")] = 300,
    repetitions: Annotated[int, typer.Option(min=1, help="Saves that are timed.")] = 5,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """How long a save holds training up, against one that is waited for."""
    with speaking_plainly():
        from cat_ray.operations.bench_checkpoint import bench_checkpoint as measure
        from cat_ray.operations.bench_checkpoint import bench_table, to_json

        saves = measure(locate(folder, endpoint_url), megabytes, repetitions)
        _tell(as_json, to_json(saves), bench_table(saves))


@bench.command("data")
def bench_data(
    job: Job,
    overrides: Overrides = None,
    images: Annotated[int, typer.Option(min=1, help="To read each time.")] = 10_000,
    cpus: Annotated[int | None, typer.Option(min=1, help=CPUS_HELP)] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 5,
    as_json: AsJson = False,
) -> None:
    """How fast a job's shards come, each step alone and beside webdataset with a DataLoader."""
    with speaking_plainly():
        from cat_ray.operations.bench_data import bench_data as measure
        from cat_ray.operations.bench_data import bench_tables, to_json

        config = configuration.load(job, overrides or ())
        speed = measure(config, images, cpus or usable_cpus(), repetitions)
        _tell(as_json, to_json(speed), bench_tables(speed))


@bench.command("waits")
def bench_waits(
    job: Job,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, help="Who ask for batches.")] = 8,
    step_seconds: Annotated[float, typer.Option(min=0.0, help="Of each step.")] = 0.05,
    steps: Annotated[int, typer.Option(min=4, help="Of each worker; half of them to start.")] = 800,
    cpus: Annotated[int | None, typer.Option(min=1, help=CPUS_HELP)] = None,
    as_json: AsJson = False,
) -> None:
    """How long workers that step at a given pace wait for a job's data."""
    with speaking_plainly():
        from cat_ray.operations.bench_waits import bench_waits as measure
        from cat_ray.operations.bench_waits import to_json, waits_table

        config = configuration.load(job, overrides or ())
        waits = measure(config, workers, step_seconds, steps, cpus or usable_cpus())
        _tell(as_json, to_json(waits), [waits_table(waits, step_seconds)])


@bench.command("step")
def bench_step(
    job: Job,
    overrides: Overrides = None,
    workers: Annotated[
        str, typer.Option(help="How many of ours, as in 1,2; the ratios are to the first.")
    ] = "1",
    steps: Annotated[int, typer.Option(min=1, help="That a repetition times.")] = 5,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 5,
    as_json: AsJson = False,
) -> None:
    """A step part by part: ours, plain PyTorch's, and in the reference recipe's order."""
    with speaking_plainly():
        from cat_ray.operations.bench_step import bench_step as measure
        from cat_ray.operations.step_comparison import step_table, to_json

        config = configuration.load(job, overrides or ())
        found = measure(config, repetitions, steps, _counts(workers))
        _tell(as_json, to_json(found), [step_table(found)])


@bench.command("recovery")
def bench_recovery(
    job: Job,
    overrides: Overrides = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs, each with every fault.")] = 5,
    as_json: AsJson = False,
) -> None:
    """How long a run stands still when nodes go and come, beside a fresh start."""
    with speaking_plainly():
        from cat_ray.operations.bench_recovery import bench_recovery as measure
        from cat_ray.operations.bench_recovery import recovery_table, to_json

        config = configuration.load(job, overrides or ())
        # What the runs say on the way is no part of what was found.
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(config, repetitions)
        _tell(as_json, to_json(found), [recovery_table(found)])


def _counts(text: str) -> tuple[int, ...]:
    """Numbers of workers, separated by commas."""
    counts = tuple(int(entry) if entry.strip().isdigit() else 0 for entry in text.split(","))
    if min(counts) < 1:
        raise BadInput(f"--workers {text}: write numbers of workers, as in 1,2")
    return counts


def _tell(as_json: bool, found: str, tables: Iterable[Table]) -> None:
    if as_json:
        typer.echo(found)
        return
    for table in tables:
        Console().print(table)
