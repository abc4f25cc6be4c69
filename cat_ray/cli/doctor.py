"""`cat-ray doctor`: a cluster or a laptop is looked at before money is spent."""

from typing import Annotated

import typer
from rich.console import Console

from cat_ray import config as configuration
from cat_ray.cli.shell import AsJson, Endpoint, Overrides, app, speaking_plainly
from cat_ray.errors import BadInput

REDUCE_SECONDS = 60.0


@app.command()
def doctor(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="Whose needs and storage count.")
    ] = None,
    overrides: Overrides = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URI", help="A place to write to, beside the job's.")
    ] = None,
    endpoint_url: Endpoint = None,
    reduce_seconds: Annotated[
        float, typer.Option(min=1.0, help="How long the all-reduce may take.")
    ] = REDUCE_SECONDS,
    as_json: AsJson = False,
) -> None:
    """Check the cluster of RAY_ADDRESS, or this machine, before money is spent.

    Versions, GPUs, build tools, shared memory, disks, clocks, ports, an all-reduce, and storage.
    """
    with speaking_plainly():
        if job is None and overrides:
            raise BadInput("--set changes a job: name one")
        config = configuration.load(job, overrides or ()) if job else None
        from cat_ray.doctor.examine import examine
        from cat_ray.doctor.findings import findings, passed
        from cat_ray.doctor.table import findings_table, to_json

        facts = examine(config, storage, endpoint_url, reduce_seconds)
        found = findings(facts)
        if as_json:
            typer.echo(to_json(facts, found))
        else:
            Console().print(findings_table(found))
        if not passed(found):
            raise typer.Exit(1)
