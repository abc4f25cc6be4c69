"""What is submitted: a job of any command, resolved here, under a name that people can read."""

import hashlib
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cat_ray import __version__, config
from cat_ray.data.preparation import Preparation
from cat_ray.errors import BadInput
from cat_ray.evaluation.measurement import Measurement, Sampling
from cat_ray.job_yaml import read_text, read_yaml
from cat_ray.section import Section

JOB_NAME = "job.yaml"
# Samples are not measured where nothing says by what.
KINDS: dict[str, type[Section]] = {
    "train": config.Config,
    "sample": Sampling,
    "fid": Measurement,
    "prepare": Preparation,
}
# What a command reads and writes, the folder that it writes to first.
PLACES = {
    "train": ("run.folder", "data.shards", "run.initialise_from"),
    "sample": ("output.folder", "samples.checkpoint"),
    "fid": ("output.folder", "samples.checkpoint", "reference"),
    "prepare": ("output.folder", "source.uri"),
}
DIGEST_CHARACTERS = 8
# The shell finds the interpreter that runs Ray there, and all its workers: the raylet was told it,
# whose grandchild is this shell. Where /proc doesn't say so it is the one on PATH.
FIND_PYTHON = (
    "python=$( { read -r _ _ _ raylet _ </proc/$PPID/stat && tr '\\0' '\\n' </proc/$raylet/cmdline"
    r" | sed -n 's/^--python_worker_command=\([^ ]*\) .*/\1/p'; } 2>/dev/null ); "
    'python=$(command -v "$python" || command -v python || command -v python3) || '
    "{ echo 'cat-ray: the head has no python: run `ray start` there with the folder of the python "
    "that has Ray on its PATH' >&2; exit 2; }; "
)
# By this key of a job's metadata ours are known among others'.
MARK = "cat_ray"


@dataclass(frozen=True)
class Submission:
    """A job that was read and found valid.

    Attributes:
        name: the readable part of its id.
        command: of `cat-ray`: `train`, `sample`, `fid` or `prepare`.
        text: the resolved job as YAML.
        places: of `PLACES`, those that are set.
    """

    name: str
    command: str
    text: str
    places: dict[str, str]

    @property
    def digest(self) -> str:
        """The sha256 of the resolved job."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def id_prefix(self) -> str:
        """What the ids of all attempts begin with."""
        return f"{self.name}-{self.digest[:DIGEST_CHARACTERS]}-"

    def places_of(self, working_folder: Path | None) -> dict[str, str]:
        """Its places as the cluster has them.

        Args:
            working_folder: what relative paths are below; None on another machine.

        Raises:
            BadInput: one is relative, and means nothing there.
        """
        local = [key for key, place in self.places.items() if _is_relative(place)]
        if local and working_folder is None:
            named = ", ".join(f"{key} {self.places[key]}" for key in local)
            raise BadInput(
                f"{named}: the cluster is not this machine, so a relative path means nothing "
                "there; use s3://, gs://, abfss:// or the full path of a disk that all nodes share"
            )
        return {
            key: str(working_folder / place) if working_folder and key in local else place
            for key, place in self.places.items()
        }


def read_submission(path: str, overrides: Sequence[str], name: str | None) -> Submission:
    """A job file as what is submitted; what it is a job of, its sections tell.

    Raises:
        BadInput: it is no job, or the name has nothing to read.
    """
    text = read_text(path)
    command = command_of(read_yaml(text, path))
    job = config.parse(text, path, overrides, KINDS[command], as_written=True)
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", Path(path).stem if name is None else name)
    if not readable.strip("-."):
        raise BadInput(f"--run-name {name}: use letters and digits")
    flat = config.flatten(job)
    places = {key: flat[key] for key in PLACES[command] if flat[key] is not None}
    return Submission(readable.strip("-."), command, config.dump(job), places)


def command_of(content: object) -> str:
    """The command whose sections these are; of training if they are nobody's."""
    keys = set(content) if isinstance(content, dict) else set()
    needed = {
        command: {key for key, field in kind.model_fields.items() if field.is_required()}
        for command, kind in KINDS.items()
    }
    return max(needed, key=lambda command: len(needed[command] & keys))


def next_attempt(ids: Iterable[str], prefix: str) -> int:
    """The number after the greatest of the attempts that a cluster knows."""
    known = [known_id.removeprefix(prefix) for known_id in ids if known_id.startswith(prefix)]
    return 1 + max((int(number) for number in known if number.isdecimal()), default=0)


def entry_point(command: str, working_folder: Path | None) -> str:
    """The shell command that the cluster's head runs in the folder that was sent there.

    Args:
        command: of `cat-ray`.
        working_folder: where to run it instead, so that relative paths mean what they mean here.
    """
    # `exec` leaves no shell between Ray and Python: signals and exit codes are Python's. With -P
    # the code is what PYTHONPATH says, and not what lies in the working folder.
    run = f'{FIND_PYTHON}exec "$python" -P -m cat_ray {command}'
    if working_folder is None:
        return f"{run} {JOB_NAME}"
    return f'cd {shlex.quote(str(working_folder))} || exit; {run} "$OLDPWD"/{JOB_NAME}'


def metadata(
    submission: Submission, attempt: int, folder: str, commit: str, ships_code: bool
) -> dict[str, str]:
    """What the cluster keeps about an attempt: nothing that is secret."""
    return {
        MARK: __version__,
        "code": "shipped" if ships_code else "installed",
        "run": submission.name,
        "attempt": str(attempt),
        "command": submission.command,
        "folder": folder,
        "config_sha256": submission.digest,
        "git_commit": commit,
    }


def code_commit(package: Path) -> str:
    """The git commit of a package's folder, with `+changes` if its files differ; else `unknown`."""

    def git(*arguments: str) -> str | None:
        try:
            ran = subprocess.run(["git", "-C", package, *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    # A virtual environment may lie in somebody else's repository.
    if not git("ls-files", "__init__.py"):
        return "unknown"
    return f"{git('rev-parse', 'HEAD')}{'+changes' if git('status', '--porcelain', '.') else ''}"


def _is_relative(place: str) -> bool:
    # `~` and a variable are expanded there.
    return "://" not in place and not place.startswith(("/", "~", "$", "file:"))
