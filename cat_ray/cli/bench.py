"""`cat-ray bench`: speed, as ratios of two things in one run."""

import os
from typing import Annotated

import typer
from rich.console import Console

from cat_ray import config as configuration
from cat_ray.cli.shell import AsJson, Endpoint, Job, Overrides, app, speaking_plainly
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
) -> None:
    """How long a save holds training up, against one that is waited for."""
    with speaking_plainly():
        from cat_ray.operations.bench_checkpoint import bench_checkpoint as measure
        from cat_ray.operations.bench_checkpoint import bench_table

        for table in bench_table(measure(locate(folder, endpoint_url), megabytes, repetitions)):
            Console().print(table)


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
        speed = measure(config, images, cpus or os.cpu_count() or 1, repetitions)
        if as_json:
            typer.echo(to_json(speed))
        else:
            for table in bench_tables(speed):
                Console().print(table)


@bench.command("waits")
def bench_waits(
    job: Job,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, help="Who ask for batches.")] = 8,
    step_seconds: Annotated[float, typer.Option(min=0.0, help="Of each step.")] = 0.05,
    steps: Annotated[int, typer.Option(min=4, help="Of each worker; half of them to start.")] = 800,
    cpus: Annotated[int | None, typer.Option(min=1, help=CPUS_HELP)] = None,
) -> None:
    """How long workers that step at a given pace wait for a job's data."""
    with speaking_plainly():
        from cat_ray.operations.bench_waits import bench_waits as measure
        from cat_ray.operations.bench_waits import waits_table

        config = configuration.load(job, overrides or ())
        waits = measure(config, workers, step_seconds, steps, cpus or os.cpu_count() or 1)
        Console().print(waits_table(waits, step_seconds))
