"""Commands that send a job to a Ray cluster, watch it there, and stop it."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from cat_ray.cli.shell import (
    AsJson,
    InitialiseFrom,
    Job,
    Overrides,
    app,
    speaking_plainly,
    with_beginning,
)
from cat_ray.errors import BadInput, printable

Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, as in http://HOST:8265."
    ),
]


@app.command()
def submit(
    job: Job,
    address: Address,
    overrides: Overrides = None,
    initialise_from: InitialiseFrom = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the log; end with the job's exit code.")
    ] = False,
    retries: Annotated[
        int, typer.Option(min=0, help="With --follow: tries after exit code 75, or a kill.")
    ] = 0,
    retry_failures: Annotated[
        bool, typer.Option("--retry-failures", help="Try again after exit code 1 as well.")
    ] = False,
    run_name: Annotated[
        str | None, typer.Option(help="Begins the job's id; the file's name without this.")
    ] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="Run what the cluster's image has, send no code.")
    ] = False,
    stop_seconds: Annotated[
        int, typer.Option(min=1, help="How long a stop may take to save, before it is a kill.")
    ] = 600,
) -> None:
    """Send a job of train, fid, sample or prepare to a Ray cluster."""
    with speaking_plainly():
        from cat_ray.submission.job import read_submission

        if not follow and (retries or retry_failures):
            raise BadInput("--retries needs --follow: who follows a job starts it again")
        submission = read_submission(job, with_beginning(overrides, initialise_from), run_name)
        from cat_ray.submission.attempt import how_to_go_on, packed, start
        from cat_ray.submission.follow import follow_with_retries
        from cat_ray.submission.server import JobServer

        with packed(submission, not installed, stop_seconds) as parcel:
            server = JobServer(address)
            submission_id = start(server, parcel)
            if not follow:
                typer.echo(submission_id)
                _say(how_to_go_on(server, submission_id))
                return
            _say(f"submitted {submission_id}")
            ending = follow_with_retries(
                server, parcel, submission_id, retries, retry_failures, _show, _say
            )
        raise typer.Exit(ending.exit_code)


@app.command()
def status(
    address: Address,
    submission_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="One job; all without this.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show its log; end with its exit code.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the jobs that were submitted to a Ray cluster, or follow one."""
    with speaking_plainly():
        from cat_ray.submission.follow import Follower
        from cat_ray.submission.server import JobServer
        from cat_ray.submission.status import job_table, jobs_table, status_of, to_json

        if follow and (submission_id is None or as_json):
            raise BadInput("--follow needs the id of one job, and no --json")
        server = JobServer(address)
        if submission_id is None:
            jobs = [status_of(job) for job in server.jobs()]
            shown = to_json(jobs) if as_json else jobs_table(jobs)
        else:
            known = status_of(server.job(submission_id))
            if follow:
                ending = Follower(server, submission_id, _show, _say).follow()
                _say(f"{submission_id} ended: {ending}")
                raise typer.Exit(ending.exit_code)
            shown = to_json([known]) if as_json else job_table(known, server.log(submission_id))
        if as_json:
            typer.echo(shown)
        else:
            Console(soft_wrap=True).print(shown, markup=False, highlight=False)


@app.command()
def stop(
    submission_id: Annotated[str, typer.Argument(metavar="ID", help="As `cat-ray status` has it.")],
    address: Address,
) -> None:
    """Have a submitted job save and stop; the same submission goes on from there."""
    with speaking_plainly():
        from cat_ray.submission.attempt import stop as stop_attempt
        from cat_ray.submission.server import JobServer

        typer.echo(printable(stop_attempt(JobServer(address), submission_id, _say)))


def _show(text: str) -> None:
    from cat_ray.submission.status import log_text

    sys.stdout.write(log_text(text))
    sys.stdout.flush()


def _say(line: str) -> None:
    print(f"cat-ray: {printable(line)}", file=sys.stderr, flush=True)
