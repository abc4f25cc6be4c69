"""What a node says of itself: asked in a process that Ray started there."""

import os
import platform
import resource
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cat_ray import __version__
from cat_ray.doctor.facts import Disk, NodeFacts
from cat_ray.versions import PACKAGES

SHARED_MEMORY = Path("/dev/shm")
# As torch.utils.cpp_extension looks for one, which DeepSpeed builds with.
COMPILER_VARIABLE, COMPILER = "CXX", "c++"


def facts_here(staging_folder: str, ray_temp: str) -> NodeFacts:
    """The facts of the machine, or container, that this runs on.

    Args:
        staging_folder: where checkpoints wait for their upload.
        ray_temp: Ray's temporary folder.
    """
    return NodeFacts(
        versions={
            "python": platform.python_version(),
            # Our own code may have come with a job, and not be installed there.
            "cat-ray": __version__,
            **{name: _version(name) for name in PACKAGES},
        },
        torch_gpus=torch.cuda.device_count(),
        shared_memory_bytes=(
            shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None
        ),
        ninja=shutil.which("ninja"),
        compiler=shutil.which(os.environ.get(COMPILER_VARIABLE, COMPILER)),
        staging=_disk(staging_folder),
        ray_temp=_disk(ray_temp),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _disk(folder: str) -> Disk:
    there = Path(folder)
    while not there.exists():
        there = there.parent
    usage = shutil.disk_usage(there)
    return Disk(folder, usage.free, usage.total)
