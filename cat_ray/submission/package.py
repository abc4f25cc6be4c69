"""What travels to the cluster: the resolved job and, unless it is installed there, our code."""

import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from cat_ray.errors import BadInput
from cat_ray.submission.job import JOB_NAME

PACKAGE = Path(__file__).parent.parent
# What the package needs beside its code, as pyproject.toml has it; what else lies there stays here.
DATA = frozenset({"operations/gpus.yaml"})
NEEDED = frozenset({"__init__.py", "__main__.py"}) | DATA
# Ray's own limit for what is sent to a cluster, on the compressed files.
LIMIT_BYTES = 100 * 2**20
NAMED = 3


def code_files(package: Path = PACKAGE) -> dict[str, Path]:
    """Our code's files, by their path in the folder that is sent: `.py` files and `DATA`.

    Left out are links, what a dot begins, and folders that are no packages.

    Raises:
        BadInput: what the package can't do without isn't among them.
    """
    found: dict[str, Path] = {}
    # It enters no linked folders.
    for folder, folders, names in os.walk(package, followlinks=False):
        folders[:] = [name for name in folders if _is_package(Path(folder, name))]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            name = path.relative_to(package).as_posix()
            if (path.suffix == ".py" or name in DATA) and stat.S_ISREG(path.lstat().st_mode):
                found[name] = path
    missing = sorted(NEEDED - found.keys())
    if missing:
        raise BadInput(
            f"{package / missing[0]} is missing or a link, which isn't sent: install cat-ray with "
            "copies of its files (uv: --link-mode copy), or submit with --installed"
        )
    return {f"{package.name}/{name}": found[name] for name in sorted(found)}


def _is_package(folder: Path) -> bool:
    return not folder.name.startswith((".", "__")) and (folder / "__init__.py").is_file()


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
