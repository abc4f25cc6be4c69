"""What all commands share: the application, common arguments, and how mistakes are told."""

import contextlib
import math
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Annotated, NoReturn

import typer
import yaml

from cat_ray.errors import BadInput, ExpectedError, printable
from cat_ray.ray_errors import TASK_ADVICE, Kind, cause_of, described, inner_errors
from cat_ray.storage import Location
from cat_ray.storage_errors import no_space_left
from cat_ray.uris import redacted

INTERRUPTED = 130
DEBUG = threading.Event()

app = typer.Typer(
    name="cat-ray",
    help="Trains CAT, a one-step multi-stage GAN, on a Ray cluster that may shrink and grow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

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
InitialiseFrom = Annotated[
    str | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="Begin with the weights of a checkpoint, or of a run's newest; run.initialise_from.",
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder, or a run's for its newest."),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]


def with_beginning(overrides: list[str] | None, initialise_from: str | None) -> list[str]:
    """The overrides, and `--initialise-from` as one of them."""
    if not initialise_from:
        return list(overrides or ())
    # As YAML: JSON writes an emoji as two characters that are none.
    value = yaml.safe_dump(initialise_from, default_style='"', width=math.inf).strip()
    return [*(overrides or ()), f"run.initialise_from={value}"]


def existing_run(place: Location) -> Location:
    """The same place.

    Raises:
        BadInput: it is no run's folder.
    """
    from cat_ray.operations.identity import CONFIG_NAME
    from cat_ray.schedule import check_has_no_phases

    if not (place / CONFIG_NAME).exists():
        check_has_no_phases(place)
        raise BadInput(f"{place.uri} is no run folder: it has no {CONFIG_NAME}")
    return place


@contextlib.contextmanager
def speaking_plainly() -> Iterator[None]:
    """Every failure ends the command with one message and an exit code.

    A traceback is shown only after `cat-ray --debug`.
    """
    try:
        yield
    except typer.Exit:
        raise
    except ExpectedError as error:
        # One that was raised in a task of Ray's has Ray's words around it.
        told = next(inner for inner in inner_errors(error) if isinstance(inner, ExpectedError))
        _end(error, str(told), told.exit_code)
    except KeyboardInterrupt as error:
        _end(error, "interrupted", INTERRUPTED)
    except OSError as error:
        full = no_space_left(error)
        if full is None:
            _end_unexpected(error)
        _end(error, str(full), full.exit_code)
    except Exception as error:
        _end_unexpected(error)


def _end_unexpected(error: Exception) -> NoReturn:
    if cause_of(error).kind != Kind.OTHER:
        _end(error, described(error, TASK_ADVICE), ExpectedError.exit_code)
    told = f"unexpected {cause_of(error).text}"
    advice = "run it again as `cat-ray --debug ...` for the traceback, and report it"
    _end(error, f"{told} ({advice})", ExpectedError.exit_code)


def _end(error: BaseException, message: str, exit_code: int) -> NoReturn:
    if DEBUG.is_set():
        print(redacted("".join(traceback.format_exception(error))), file=sys.stderr)
    print(f"cat-ray: {printable(redacted(message))}", file=sys.stderr)
    raise typer.Exit(exit_code) from None


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of whatever ends the command.")
    ] = False,
) -> None:
    """Options of every command, before its name."""
    if debug:
        DEBUG.set()
