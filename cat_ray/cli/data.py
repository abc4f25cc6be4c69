"""Commands that make shards."""

from typing import Annotated

import typer

from cat_ray import config as configuration
from cat_ray.cli.shell import Endpoint, Overrides, app, speaking_plainly
from cat_ray.errors import BadInput, printable
from cat_ray.storage import locate

RETRY_SECONDS = 60.0


@app.command()
def prepare(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Such as jobs/prepare_imagenet.yaml.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is found and left out; write nothing.")
    ] = False,
) -> None:
    """Write shards and their index; the same command again continues where it stopped."""
    with speaking_plainly():
        from cat_ray.data.found import look
        from cat_ray.data.preparation import Preparation
        from cat_ray.data.prepare import left_out
        from cat_ray.data.prepare import prepare as write_shards

        config = configuration.load(job, overrides or (), Preparation)
        if dry_run:
            typer.echo(printable(look(config).describe()))
            return
        made = write_shards(config, lambda told: typer.echo(printable(told)))
        typer.echo(f"{made.describe()}: {config.output.folder}")
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
    with speaking_plainly():
        from cat_ray.data.indexing import index_shards

        uri, pattern = shards.rsplit("/", 1) if shards.endswith(".tar") else (shards, "")
        place = locate(uri, endpoint_url, retry_seconds=RETRY_SECONDS)
        made, problems = index_shards(place, pattern, num_classes, verify)
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
