"""A process of a measurement: what it takes of Ray, and how it is set up."""

import os
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
        os.nice(LOWEST_PRIORITY)
    return torch.device("cuda" if workers.gpu else "cpu")
