"""Commands that train, and show what a run has left."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cat_ray import config as configuration
from cat_ray.cli.shell import (
    AsJson,
    Checkpoint,
    Endpoint,
    InitialiseFrom,
    Job,
    Overrides,
    RunFolder,
    app,
    existing_run,
    speaking_plainly,
    with_beginning,
)
from cat_ray.errors import BadInput
from cat_ray.stop_signals import stoppable
from cat_ray.storage import locate


@app.command()
def train(job: Job, overrides: Overrides = None, initialise_from: InitialiseFrom = None) -> None:
    """Train a job; the same command again continues it where it stopped."""
    with speaking_plainly(), stoppable():
        config = configuration.load(job, with_beginning(overrides, initialise_from))
        from cat_ray.training.phases import train_job

        report = train_job(config)
        typer.echo(f"report: {report.uri}")


@app.command()
def report(
    run: RunFolder,
    endpoint_url: Endpoint = None,
) -> None:
    """Write report.html into a run's folder, from what the run has written so far."""
    with speaking_plainly():
        from cat_ray.operations.report import write_report

        typer.echo(write_report(existing_run(locate(run, endpoint_url))).uri)


@app.command()
def cost(
    run: RunFolder,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Show where every worker-second of a run went, and what it cost."""
    with speaking_plainly():
        from cat_ray.operations.cost import beside_seconds_of, cost_table, summarise, to_json
        from cat_ray.operations.goodput import read_ledger
        from cat_ray.operations.identity import CONFIG_NAME
        from cat_ray.operations.journal import read_rows

        place = existing_run(locate(run, endpoint_url))
        prices = configuration.parse((place / CONFIG_NAME).read().decode(), place.uri).cost
        rates = prices.spot_per_gpu_hour, prices.on_demand_per_gpu_hour
        beside_seconds = beside_seconds_of(read_rows(place))
        summary = summarise(read_ledger(place), beside_seconds=beside_seconds)
        if as_json:
            typer.echo(to_json(summary, *rates))
        else:
            Console().print(cost_table(summary, *rates))


@app.command()
def inspect(
    checkpoint: Checkpoint,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file.")] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Show what a checkpoint holds, and whether it is undamaged."""
    with speaking_plainly():
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
        console = Console(soft_wrap=True, markup=False, emoji=False)
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
