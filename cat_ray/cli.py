"""The command line: each command a few lines that call a module."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cat_ray import config as configuration
from cat_ray.errors import BadInput, RunFailed, Unfinished
from cat_ray.storage import Location, locate

app = typer.Typer(
    name="cat-ray",
    help="Trains CAT, a one-step multi-stage GAN, on a Ray cluster that may shrink and grow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
bench = typer.Typer(help="Measure speed, as ratios of two things in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Endpoint = Annotated[
    str | None,
    typer.Option("--endpoint-url", help="S3 endpoint, for s3:// on something else than AWS."),
]
Job = Annotated[
    str, typer.Argument(metavar="JOB", help="A job file, such as jobs/quickstart.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a value, as in run.seed=1."),
]
Checkpoint = Annotated[
    str,
    typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder, or a run's for its newest."),
]

RETRY_SECONDS = 60.0
CPUS_HELP = "Cores to use; all of this machine's if unset."

RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")]


@app.command()
def train(job: Job, overrides: Overrides = None) -> None:
    """Train a job; the same command again continues it where it stopped."""
    with _speaking_plainly():
        config = configuration.load(job, overrides or ())
        from cat_ray.training.driver import train as run_job

        report = run_job(config)
        typer.echo(f"report: {report.uri}")


@app.command()
def prepare(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Such as jobs/prepare_imagenet.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Write shards and their index; the same command again continues where it stopped."""
    with _speaking_plainly():
        from cat_ray.data.preparation import Preparation
        from cat_ray.data.prepare import left_out
        from cat_ray.data.prepare import prepare as write_shards

        config = configuration.load(job, overrides or (), Preparation)
        typer.echo(f"{write_shards(config).describe()}: {config.output.folder}")
        if count := left_out(config):
            typer.echo(f"{count:,} were left out, for the reasons in broken.json there")


@app.command()
def index(
    shards: Annotated[
        str,
        typer.Argument(
            metavar="URI",
            help="A folder of tar files, or their names, as in s3://b/train-{000000..000146}.tar.",
        ),
    ],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Decode every image, and look for names that come twice."),
    ] = False,
    num_classes: Annotated[int | None, typer.Option(help="Class ids must be below this.")] = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Write the index.json of WebDataset shards that others made, and say what is wrong there."""
    with _speaking_plainly():
        from cat_ray.data.indexing import index_shards

        uri, pattern = shards.rsplit("/", 1) if shards.endswith(".tar") else (shards, "")
        place = locate(uri, endpoint_url)
        made, problems = index_shards(place, pattern, num_classes, verify, RETRY_SECONDS)
        for line in problems:
            typer.echo(line)
        if made is not None:
            typer.echo(f"{made.describe()}: {place.uri}")
        if problems:
            what = (
                "no index was written"
                if made is None
                else "the index was written, and has these samples in it"
            )
            many = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise BadInput(f"{many} in {place.uri}: {what}")


@app.command()
def sample(
    checkpoint: Checkpoint,
    out: Annotated[str, typer.Option(help="A new or empty folder for the pictures.")] = "samples",
    classes: Annotated[str, typer.Option(help="Class ids, as in 0,3,7; all without this.")] = "",
    count: Annotated[int, typer.Option(min=1, help="Pictures of each class.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the latents.")] = 0,
    decay: Annotated[
        float | None, typer.Option(help="Which average of the weights; 0 for the raw ones.")
    ] = None,
    truncation: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="How far styles are drawn to their class's mean."),
    ] = 0.0,
    endpoint_url: Endpoint = None,
) -> None:
    """Make a grid and single PNGs for classes and a seed."""
    with _speaking_plainly():
        from cat_ray.evaluation.pictures import write_pictures

        chosen = _numbers(classes)
        folder = locate(out, endpoint_url)
        written = write_pictures(
            locate(checkpoint, endpoint_url), folder, chosen, count, seed, decay, truncation
        )
        typer.echo(f"{written} pictures and grid.png: {folder.uri}")


@app.command()
def fid(
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="Such as jobs/fid.yaml.")] = None,
    overrides: Overrides = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two result files: may their distances be compared?"),
    ] = None,
    truncation: Annotated[
        str,
        typer.Option(metavar="VALUES", help="Measure at each, as in 0,0.05,0.1: same latents."),
    ] = "",
    endpoint_url: Endpoint = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Measure a checkpoint's samples against real images; or compare two results."""
    with _speaking_plainly():
        if (job is None) == (compare is None) or (truncation and compare):
            raise BadInput("give a job, or --compare and two result files")
        if compare is not None:
            _compare_results(compare, endpoint_url)
            return
        from cat_ray.evaluation.measurement import Measurement

        every = [f"samples.truncation={value}" for value in truncation.split(",") if truncation]
        asked = [[*(overrides or ()), value] for value in every] or [overrides or ()]
        jobs = [configuration.load(job or "", changes, Measurement) for changes in asked]
        if truncation:
            from cat_ray.evaluation.sweep import sweep, sweep_table

            results, place = sweep(jobs)
            table = sweep_table(results)
        else:
            from cat_ray.evaluation.fid import fid as measure
            from cat_ray.evaluation.result import result_table

            result, place = measure(jobs[0])
            table = result_table(result)
        if as_json:
            typer.echo(place.read().decode())
        else:
            Console().print(table)
            typer.echo(f"result: {place.uri}")


def _compare_results(places: tuple[str, str], endpoint_url: str | None) -> None:
    from cat_ray.evaluation.result import FRECHET, differences, read_result

    a, b = (read_result(locate(place, endpoint_url)) for place in places)
    lines = list(differences(a, b))
    if lines:
        typer.echo("not comparable: " + "; ".join(lines))
        raise typer.Exit(1)
    for place, result in zip(places, (a, b), strict=True):
        typer.echo(f"{result.metric} {result.figures[FRECHET]:.6g}  {place}")
    typer.echo("comparable")


@app.command()
def inspect(
    checkpoint: Checkpoint,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file.")] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Show what a checkpoint holds, and whether it is undamaged."""
    with _speaking_plainly():
        from cat_ray.checkpoint.layout import read_manifest
        from cat_ray.checkpoint.read import read_config, read_state, resolve
        from cat_ray.checkpoint.read import verify as damages

        place = resolve(locate(checkpoint, endpoint_url))
        if verify and (damaged := damages(place)):
            raise BadInput(
                f"{'; '.join(damaged)}: a run in this folder goes on from the newest checkpoint "
                "that is not damaged"
            )
        state, config = read_state(place), read_config(place)
        table = Table("file", "bytes", "sha256", title=place.uri, title_justify="left")
        for record in read_manifest(place) or ():
            table.add_row(record.name, f"{record.bytes:,}", record.sha256[:16])
        console = Console(soft_wrap=True)
        console.print(table)
        size = config.model.generator.size
        console.print(
            f"images seen {state.images:,} of {config.run.total_images:,}, "
            f"seed {config.run.seed}, noise stream {state.noise_stream}, "
            f"averages {list(config.optimisation.ema_decays)}, "
            f"generator {size if isinstance(size, str) else size.model_dump()}"
            f"/{config.model.generator.patch} at {config.model.resolution} px"
        )
        console.print(", ".join(f"{name} {version}" for name, version in state.versions.items()))
        if verify:
            console.print("every file has the sha256 of the manifest")


@app.command()
def cost(
    run: RunFolder,
    endpoint_url: Endpoint = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show where every worker-second of a run went, and what it cost."""
    with _speaking_plainly():
        from cat_ray.operations.cost import cost_table, summarise, to_json
        from cat_ray.operations.goodput import read_ledger
        from cat_ray.operations.identity import CONFIG_NAME

        place = _existing_run(locate(run, endpoint_url))
        prices = configuration.parse((place / CONFIG_NAME).read().decode(), place.uri).cost
        rates = prices.spot_per_gpu_hour, prices.on_demand_per_gpu_hour
        summary = summarise(read_ledger(place))
        if as_json:
            typer.echo(to_json(summary, *rates))
        else:
            Console().print(cost_table(summary, *rates))


@app.command()
def drill(
    job: Job,
    schedule: Annotated[
        str, typer.Option(help="Faults as kind@images[:rank]; one of each kind without this.")
    ] = "",
    overrides: Overrides = None,
) -> None:
    """Train a job with faults put in on purpose; pass or fail, promise by promise.

    Kinds: raise, kill, stop (SIGSTOP), refuse (uploads), truncate (the newest checkpoint), and for
    nodes drain, remove, add.
    """
    with _speaking_plainly():
        from cat_ray.operations.drill import default_schedule, drill_tables
        from cat_ray.operations.drill import drill as run_drill
        from cat_ray.training.faults import parse_schedule

        config = configuration.load(job, overrides or ())
        if schedule:
            faults = parse_schedule(schedule)
        else:
            config, faults = default_schedule(config)
        found = run_drill(config, faults)
        for table in drill_tables(found):
            Console().print(table)
        if not found.passed:
            raise typer.Exit(1)


@app.command("verify-resume")
def verify_resume(job: Job, overrides: Overrides = None) -> None:
    """Train a job's first steps undisturbed, killed and resized; compare what comes out."""
    with _speaking_plainly():
        from cat_ray.operations.comparison import comparison_tables
        from cat_ray.operations.verify_resume import verify_resume as compare

        compared = compare(configuration.load(job, overrides or ()))
        for table in comparison_tables(compared):
            Console().print(table)
        if not all(row.same for row in compared):
            raise typer.Exit(1)


@bench.command("checkpoint")
def bench_checkpoint(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A new or empty folder.")],
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the state.")] = 300,
    repetitions: Annotated[int, typer.Option(min=1, help="Saves that are timed.")] = 5,
    endpoint_url: Endpoint = None,
) -> None:
    """How long a save holds training up, against one that is waited for."""
    with _speaking_plainly():
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
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """How fast a job's shards come, each step alone and beside webdataset with a DataLoader."""
    with _speaking_plainly():
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
    with _speaking_plainly():
        from cat_ray.operations.bench_waits import bench_waits as measure
        from cat_ray.operations.bench_waits import waits_table

        config = configuration.load(job, overrides or ())
        waits = measure(config, workers, step_seconds, steps, cpus or os.cpu_count() or 1)
        Console().print(waits_table(waits, step_seconds))


@app.command()
def report(
    run: RunFolder,
    endpoint_url: Endpoint = None,
) -> None:
    """Write report.html into a run's folder, from what the run has written so far."""
    with _speaking_plainly():
        from cat_ray.operations.report import write_report

        typer.echo(write_report(_existing_run(locate(run, endpoint_url))).uri)


def _existing_run(place: Location) -> Location:
    from cat_ray.operations.identity import CONFIG_NAME

    if not (place / CONFIG_NAME).exists():
        raise BadInput(f"{place.uri} is no run folder: it has no {CONFIG_NAME}")
    return place


def _numbers(text: str) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise BadInput(f"--classes {text}: write class ids separated by commas") from error


@contextlib.contextmanager
def _speaking_plainly() -> Iterator[None]:
    """What was foreseen ends the command with one message and its exit code, no traceback."""
    try:
        yield
    except (BadInput, RunFailed, Unfinished) as error:
        print(f"cat-ray: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
