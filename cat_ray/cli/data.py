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
        list[str],
        typer.Argument(
            metavar="URI...",
            help=(
                "A folder of tar files, or the tar files of one, as in "
                "'s3://b/train-{000000..000146}.tar', with or without the quotes."
            ),
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
        from cat_ray.data.shard_uris import folder_and_names

        uri, names = folder_and_names(shards)
        place = locate(uri, endpoint_url, retry_seconds=RETRY_SECONDS)
        made = index_shards(place, names, num_classes, verify)
        if made.left_out:
            typer.echo(_one_line(made.left_out))
        what = (
            "no index was written"
            if made.index is None
            else "the index was written, and has these samples in it"
        )
        if made.index is None and len(made.problems) == 1:
            raise BadInput(f"{place.uri}: {_one_line(made.problems[0])}: {what}")
        for line in made.problems:
            typer.echo(_one_line(line))
        if made.index is not None:
            typer.echo(f"{made.index.describe()}: {place.uri}")
        if made.problems:
            many = "1 problem" if len(made.problems) == 1 else f"{len(made.problems)} problems"
            raise BadInput(f"{many} in {place.uri}: {what}")


def _one_line(told: str) -> str:
    # Names of members are foreign.
    return printable(told.replace("\n", "\\n"))
