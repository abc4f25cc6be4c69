"""What the process of a training worker begins with."""

import os
import subprocess
import sys

from cat_ray.config import Workers
from cat_ray.training.process import worker_environment

# Prints the pages that five steps of a thread had to get from the kernel, after the first ones, in
# which glibc finds places for all. A step holds 131 MB.
STEPS = """
import resource, threading, torch

def step():
    tensors = [torch.ones(megabytes << 18) for megabytes in (1, 30, 100)]
    assert len(tensors) == 3

def steps():
    for _ in range(20):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""


def pages_asked_for(environment: dict[str, str]) -> int:
    result = subprocess.run(
        [sys.executable, "-c", STEPS],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


def test_on_a_cpu_a_step_uses_the_memory_of_the_one_before() -> None:
    assert 10 * pages_asked_for(worker_environment(Workers())) < pages_asked_for({})


def test_on_a_gpu_the_environment_is_left_alone() -> None:
    assert worker_environment(Workers(gpu=True)) == {}
