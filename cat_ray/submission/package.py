"""What travels to the cluster: the resolved job and, unless it is installed there, our code."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from cat_ray.errors import BadInput
from cat_ray.submission.job import JOB_NAME

PACKAGE = Path(__file__).parent.parent
# Code and its tables; a stray checkpoint, key or picture beside them stays here.
SUFFIXES = (".py", ".typed", ".csv", ".json", ".yaml", ".toml")
# Ray's own limit for what is sent to a cluster, on the compressed files.
LIMIT_BYTES = 100 * 2**20
NAMED = 3


def code_files(package: Path = PACKAGE) -> dict[str, Path]:
    """Our code's files, by their path in the folder that is sent."""
    return {
        path.relative_to(package.parent).as_posix(): path
        for path in sorted(package.rglob("*"))
        if path.is_file() and path.suffix in SUFFIXES
    }


def fill(folder: Path, job: str, code: Mapping[str, Path]) -> None:
    """Puts what travels into an empty folder.

    Raises:
        BadInput: it is too large.
    """
    check_size(
        {JOB_NAME: len(job.encode()), **{name: path.stat().st_size for name, path in code.items()}}
    )
    (folder / JOB_NAME).write_text(job)
    for name, path in code.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def check_size(sizes: Mapping[str, int], limit: int = LIMIT_BYTES) -> None:
    """Compares the bytes of all files, as they are, with what a cluster takes.

    Raises:
        BadInput: there are more; the message names the biggest files.
    """
    total = sum(sizes.values())
    if total < limit:
        return
    biggest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:NAMED]
    named = ", ".join(f"{name} {_megabytes(sizes[name])}" for name in biggest)
    raise BadInput(
        f"what would be sent to the cluster is {_megabytes(total)}, its limit is "
        f"{_megabytes(limit)}; the biggest files are {named}: move them away, or install cat-ray "
        "in the cluster's image and submit with --installed"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
