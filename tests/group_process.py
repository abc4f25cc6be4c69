"""A process of a gloo group, forked from one that has loaded torch and DeepSpeed already.

Loading them takes longer than most of the steps that a test takes.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "deepspeed", "cat_ray.training.loop"])


def start(
    script: Path, arguments: tuple[str, ...], environment: dict[str, str], output: Path
) -> ForkServerProcess:
    """Starts `python SCRIPT ARGUMENTS`, its output in a file."""
    process = FORKS.Process(target=_run, args=(script, arguments, environment, output))
    process.start()
    return process


def _run(
    script: Path, arguments: tuple[str, ...], environment: dict[str, str], output: Path
) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    # OMP_NUM_THREADS is read when torch is loaded.
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
