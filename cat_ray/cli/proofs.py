"""Commands that prove what a run promises, on the user's own machines."""

from typing import Annotated

import typer
from rich.console import Console

from cat_ray import config as configuration
from cat_ray.cli.shell import Job, Overrides, app, speaking_plainly


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
    with speaking_plainly():
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
    with speaking_plainly():
        from cat_ray.operations.comparison import comparison_tables
        from cat_ray.operations.verify_resume import verify_resume as compare

        compared = compare(configuration.load(job, overrides or ()))
        for table in comparison_tables(compared):
            Console().print(table)
        if not all(row.same for row in compared):
            raise typer.Exit(1)
