"""What a cluster knows about submitted jobs, for people and for programs."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from ray.job_submission import JobDetails
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cat_ray.errors import printable
from cat_ray.submission.server import ending_of

LAST_LINES = 5
COLOUR_OR_RETURN = re.compile(r"(\x1b\[[0-9;]*m|\r)")


@dataclass(frozen=True)
class Status:
    """A submitted job.

    Attributes:
        id: its submission id.
        state: `pending`, `running`, or how it ended.
        exit_code: what a follower ends with; None before the end.
        started: unix time, None if it has not.
        ended: unix time, None if it has not.
        metadata: what was sent with it: run, attempt, folder, config_sha256, git_commit...
    """

    id: str
    state: str
    exit_code: int | None
    started: float | None
    ended: float | None
    metadata: dict[str, str]


def status_of(job: JobDetails) -> Status:
    """What a job's details say."""
    ending = ending_of(job)
    return Status(
        id=str(job.submission_id),
        state=job.status.value.lower() if ending is None else ending.word,
        exit_code=None if ending is None else ending.exit_code,
        started=job.start_time / 1000 if job.start_time else None,
        ended=job.end_time / 1000 if job.end_time and ending else None,
        metadata=dict(job.metadata or {}),
    )


def jobs_table(jobs: Sequence[Status]) -> RenderableType:
    """All jobs, a line each."""
    if not jobs:
        return "no job was submitted here by cat-ray"
    table = Table()
    # An id that is cut can't be copied.
    table.add_column("id", no_wrap=True, min_width=max(len(printable(job.id)) for job in jobs))
    for heading in ("state", "exit code", "started", "ended", "folder"):
        table.add_column(heading, overflow="fold")
    for job in jobs:
        folder = job.metadata.get("folder", "")
        times = (_time(job.started), _time(job.ended))
        table.add_row(printable(job.id), job.state, _code(job), *times, printable(folder))
    return table


def job_table(job: Status, log: str) -> RenderableType:
    """One job, and the end of its log."""
    title = Text(printable(job.id))
    table = Table("", "", show_header=False, title=title, title_justify="left")
    table.columns[1].overflow = "fold"
    rows = {
        "state": job.state,
        "exit code": _code(job),
        "started": _time(job.started),
        "ended": _time(job.ended),
        **job.metadata,
    }
    for name, value in rows.items():
        if value:
            table.add_row(printable(name), printable(value))
    last = log.rstrip().splitlines()[-LAST_LINES:]
    return Group(table, *(Text.from_ansi(log_text(line)) for line in last))


def log_text(text: str) -> str:
    """A log as a terminal may be given it.

    Colours and the carriage returns of progress bars stay. All else that a terminal obeys is made
    visible: a log holds what shards, servers and other programs told.
    """
    parts = COLOUR_OR_RETURN.split(text)
    return "".join(part if at % 2 else printable(part) for at, part in enumerate(parts))


def to_json(jobs: Sequence[Status]) -> str:
    """The same for a program."""
    return json.dumps([asdict(job) for job in jobs], indent=1)


def _code(job: Status) -> str:
    return "" if job.exit_code is None else str(job.exit_code)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
