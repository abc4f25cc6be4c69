"""`cat-ray plan`: what a job will need and cost, with no GPU and no Ray."""

from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from cat_ray import config as configuration
from cat_ray.cli.shell import (
    AsJson,
    Endpoint,
    InitialiseFrom,
    Job,
    Overrides,
    app,
    speaking_plainly,
    with_beginning,
)
from cat_ray.schedule import check_has_no_schedule
from cat_ray.storage import locate

COLUMNS = 100
MFU_HELP = (
    "Share of the peak that is reached; one H200 reached 0.16 with cat_h2_256, compiled 0.22."
)
GPU_HELP = "A type of operations/gpus.yaml, or cpu; H100 unless the job's workers have no GPU."


@app.command()
def plan(
    job: Job,
    overrides: Overrides = None,
    initialise_from: InitialiseFrom = None,
    gpu: Annotated[str | None, typer.Option(help=GPU_HELP)] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="How many; workers.maximum of the job if unset.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Of each machine.")] = 8,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help=MFU_HELP)] = 0.16,
    interruptions_per_hour: Annotated[
        float, typer.Option(min=0.0, help="Of the whole run, for the save interval.")
    ] = 1.0,
    upload: Annotated[
        float, typer.Option("--upload-mb-per-second", min=0.1, help="Of each machine.")
    ] = 200.0,
    download: Annotated[
        float, typer.Option("--download-mb-per-second", min=0.1, help="Of each machine.")
    ] = 1000.0,
    trace: Annotated[
        str | None,
        typer.Option("--replay", metavar="TRACE", help="Simulate the run on a spot trace (CSV)."),
    ] = None,
    measured_run: Annotated[
        str | None,
        typer.Option("--measured", metavar="RUN", help="A run whose recovery times to take."),
    ] = None,
    restart_seconds: Annotated[
        float | None, typer.Option(min=0.0, help="After a loss without notice.")
    ] = None,
    drain_seconds: Annotated[
        float | None, typer.Option(min=0.0, help="After a notice, the save aside.")
    ] = None,
    join_seconds: Annotated[
        float | None, typer.Option(min=0.0, help="When nodes join, the save aside.")
    ] = None,
    save_seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Until a save is on the storage.")
    ] = None,
    notice_seconds: Annotated[
        float, typer.Option(min=0.0, help="AWS 120, GCP and Azure about 30.")
    ] = 120.0,
    seed: Annotated[int, typer.Option(min=0, help="Of which nodes of a larger trace go.")] = 0,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a job needs and costs: memory, time, money, storage, saves, what won't fit."""
    with speaking_plainly():
        config = configuration.load(job, with_beginning(overrides, initialise_from))
        from cat_ray.operations.gpus import find_gpu
        from cat_ray.operations.plan import Assumptions, make_plan
        from cat_ray.operations.plan_job import plan_job, planned_tables, planned_to_json
        from cat_ray.operations.recovery import Measured, RecoveryTimes, measured_by
        from cat_ray.operations.replay_job import SIZES, cases_to_json, replay_job, replay_tables
        from cat_ray.operations.save_size import Rates
        from cat_ray.operations.spot_trace import read_trace

        name = gpu or ("H100" if config.workers.gpu else "cpu")
        assumptions = Assumptions(
            gpu=None if name.lower() == "cpu" else find_gpu(name),
            workers=gpus or config.workers.maximum,
            workers_per_machine=gpus_per_node,
            utilisation=mfu,
            interruptions_per_hour=interruptions_per_hour,
            rates=Rates(upload=upload * 1e6, restore=download * 1e6),
        )
        read = read_trace(trace) if trace else None
        # Narrower, a table's last digits would be cut.
        console = Console(width=max(COLUMNS, Console().width))
        if read is None:
            runs = plan_job(config, assumptions)
            if as_json:
                typer.echo(planned_to_json(runs))
            else:
                for table in planned_tables(runs):
                    console.print(table)
            return
        check_has_no_schedule(config, "--replay")
        planned = make_plan(config, assumptions)
        measured = Measured(RecoveryTimes(), None, None)
        if measured_run:
            measured = measured_by(locate(measured_run, endpoint_url))
        given = {"killed": restart_seconds, "drained": drain_seconds, "joined": join_seconds}
        known = {kind: seconds for kind, seconds in given.items() if seconds is not None}
        if known:
            told = f"{measured.times.source}; {', '.join(known)} as given"
            measured = replace(measured, times=replace(measured.times, **known, source=told))
        if save_seconds is not None:
            measured = replace(measured, stored_seconds=save_seconds)
        sizes = (gpus,) if gpus else SIZES
        cases = replay_job(config, planned, read, sizes, measured, notice_seconds, seed)
        if as_json:
            typer.echo(cases_to_json(cases, read, measured))
        else:
            for table in replay_tables(cases, read, measured, planned):
                console.print(table)
