"""Commands that sample a checkpoint and measure it."""

from typing import Annotated

import typer
from rich.console import Console

from cat_ray import config as configuration
from cat_ray.cli.shell import AsJson, Endpoint, Overrides, app, speaking_plainly
from cat_ray.errors import BadInput
from cat_ray.storage import locate

JOB_ENDINGS = (".yaml", ".yml")


@app.command()
def sample(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|JOB",
            help="A checkpoint's folder, a run's for its newest; or a job such as "
            "jobs/sample.yaml, for many samples in parallel.",
        ),
    ],
    overrides: Overrides = None,
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
    """Make a grid and single PNGs for classes and a seed; or all that a job says."""
    with speaking_plainly():
        if checkpoint.endswith(JOB_ENDINGS):
            _refuse_given(context, but=("checkpoint", "overrides"))
            _make_samples(checkpoint, overrides or [])
            return
        if overrides:
            raise BadInput(f"--set goes with a job, and {checkpoint} is none: use the options")
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
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint's samples against real images; or compare two results."""
    with speaking_plainly():
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


def _make_samples(job: str, overrides: list[str]) -> None:
    from cat_ray.evaluation.measurement import Sampling
    from cat_ray.evaluation.sample_set import make_samples

    made, place = make_samples(configuration.load(job, overrides, Sampling))
    rate = made.images_per_second.get("all")
    told = f", {rate:,.0f} images/s" if rate else ""
    typer.echo(f"{made.protocol['samples']:,} samples{told}: {place.uri}")


def _refuse_given(context: typer.Context, but: tuple[str, ...]) -> None:
    """Refuses options that were given on the command line."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in but
        # By name: newer releases of typer have a copy of click's enumeration.
        and getattr(context.get_parameter_source(parameter.name or ""), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise BadInput(
            f"{', '.join(given)} can't go with a job: say it there, or with --set section.key=value"
        )


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


def _numbers(text: str) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise BadInput(f"--classes {text}: write class ids separated by commas") from error
