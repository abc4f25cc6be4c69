"""One attempt at a job: how it is started, where nobody else is at work, and how it is stopped."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cat_ray.errors import BadInput, RunFailed
from cat_ray.operations.outcome import checkpoint_told
from cat_ray.submission.job import (
    Submission,
    code_commit,
    entry_point,
    metadata,
    next_attempt,
)
from cat_ray.submission.package import PACKAGE, code_files, fill
from cat_ray.submission.patience import Tell, patiently
from cat_ray.submission.server import JobExists, JobServer, ending_of
from cat_ray.submission.transport import ServerDown, one_line

# Read by what watches the command on the cluster, from the environment of the job.
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Parcel:
    """What every attempt sends: the same folder, whatever is edited here meanwhile.

    Attributes:
        submission: the job.
        folder: where the files lie.
        ships_code: whether our code is among them.
        stop_seconds: how long a stop may take before the command is killed.
    """

    submission: Submission
    folder: Path
    ships_code: bool
    stop_seconds: int


@contextlib.contextmanager
def packed(submission: Submission, ships_code: bool, stop_seconds: int) -> Iterator[Parcel]:
    """The parcel, for as long as the block lasts.

    Raises:
        BadInput: it is too large.
    """
    with tempfile.TemporaryDirectory(prefix="cat_ray-") as name:
        fill(Path(name), submission.text, code_files() if ships_code else {})
        yield Parcel(submission, Path(name), ships_code, stop_seconds)


def start(server: JobServer, parcel: Parcel, say: Tell | None = None) -> str:
    """Starts the next attempt.

    Args:
        server: where.
        parcel: what to send.
        say: takes our lines while a server that is away is waited for; without it nobody waits.

    Returns:
        Its submission id.

    Raises:
        BadInput: a job runs that writes to the same folder, or relative paths mean nothing there.
        ServerDown: nobody answers.
    """
    submission = parcel.submission

    def look() -> tuple[Path | None, str, int]:
        working_folder = Path.cwd() if server.is_this_machine() else None
        folder = next(iter(submission.places_of(working_folder).values()))
        return working_folder, folder, _next_attempt(server, submission, folder)

    working_folder, folder, attempt = patiently(look, say) if say else look()
    submission_id = f"{submission.id_prefix}{attempt}"
    commit = code_commit(PACKAGE) if parcel.ships_code else "unknown"
    maybe_sent = False

    def send() -> None:
        nonlocal maybe_sent
        try:
            server.submit(
                submission_id,
                entry_point(submission.command, working_folder),
                parcel.folder,
                {STOP_WAIT: str(parcel.stop_seconds)},
                metadata(submission, attempt, folder, commit, parcel.ships_code),
            )
        except JobExists:
            # Where it was sent before, only the answer was lost.
            if not maybe_sent:
                raise
        except ServerDown as error:
            maybe_sent = True
            raise ServerDown(
                f"{error}; {submission_id} may have started: `cat-ray status` lists it"
            ) from error

    patiently(send, say) if say else send()
    return submission_id


def _next_attempt(server: JobServer, submission: Submission, folder: str) -> int:
    """The number of the next attempt.

    Raises:
        BadInput: a job runs that writes to the same folder.
    """
    jobs = server.jobs()
    for job in jobs:
        if ending_of(job) is None and (job.metadata or {}).get("folder") == folder:
            at_work = one_line(job.submission_id)
            raise BadInput(f"{at_work} is at work in {folder}: {how_to_go_on(server, at_work)}")
    return next_attempt((str(job.submission_id) for job in jobs), submission.id_prefix)


def how_to_go_on(server: JobServer, submission_id: str) -> str:
    """The commands that follow an attempt and stop it."""
    where = f"--address {server.address}"
    return (
        f"follow it with `cat-ray status {submission_id} --follow {where}`, "
        f"stop it with `cat-ray stop {submission_id} {where}`"
    )


def stop(server: JobServer, submission_id: str, say: Tell) -> str:
    """Stops an attempt, and waits until it has ended.

    Args:
        server: where it runs.
        submission_id: its id.
        say: takes our lines while the server is away.

    Returns:
        How it ended and, of training, the checkpoint that the same submission goes on from.

    Raises:
        BadInput: there is no such job, or it had ended before.
        RunFailed: training ended without telling of a checkpoint.
        ServerDown: nobody answers.
    """
    job = server.job(submission_id)
    ending = ending_of(job)
    if ending is not None:
        raise BadInput(f"{submission_id} had ended before: {ending}")
    server.stop(submission_id)
    while (ending := ending_of(patiently(lambda: server.job(submission_id), say))) is None:
        time.sleep(POLL_SECONDS)
    if not ending.stopped or (job.metadata or {}).get("command") != "train":
        return f"{submission_id} ended: {ending}"
    checkpoint = checkpoint_told(patiently(lambda: server.log(submission_id), say))
    if checkpoint is None:
        raise RunFailed(
            f"{submission_id} ended before it told of a checkpoint: it had not begun to train, or "
            "was killed after --stop-seconds; the same submission goes on from the newest one"
        )
    return f"{submission_id} stopped with the checkpoint {checkpoint}"
