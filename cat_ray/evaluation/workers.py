"""A process of a measurement: what it takes of Ray, and how it is set up."""

import os
import sys
from typing import Any

import torch

from cat_ray.evaluation.measurement import Workers

LOWEST_PRIORITY = 19


def resources_of(workers: Workers) -> dict[str, Any]:
    """Of Ray's resources, for each process; none of its cores where it takes what others leave."""
    cpus = 0 if workers.spare else workers.cpus_per_worker
    return {"num_cpus": cpus, "num_gpus": int(workers.gpu)}


def begin_work(workers: Workers) -> torch.device:
    """Sets the calling process up as one of them, for good, and returns its device."""
    # A sum's rounding depends on the number of threads: it is the job's, not the machine's.
    torch.set_num_threads(workers.cpus_per_worker)
    if workers.spare:
        _give_way()
    return torch.device("cuda" if workers.gpu else "cpu")


def _give_way() -> None:
    """Lets the calling thread, and those that it starts, run only where a core has nothing else."""
    if sys.platform == "linux":
        # Niceness is not enough: Ray gives its workers 15, and 19 still has a third beside that.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(LOWEST_PRIORITY)
