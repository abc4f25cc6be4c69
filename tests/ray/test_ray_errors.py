"""Failures of a real Ray, and what is told of them: its texts may change with its version."""

import json
import os
import subprocess
import sys

from cat_ray.ray_errors import Kind

ENDS = """
import json, os, signal, sys, time
import ray
from cat_ray.ray_errors import cause_of

@ray.remote(max_restarts=0, num_cpus=0)
class Worker:
    def stall(self): os._exit(75)
    def leave(self): sys.exit(75)
    def kill(self): os.kill(os.getpid(), signal.SIGKILL)
    def fail(self): raise ValueError("one\\ntwo")
    def fill(self):
        filled = bytearray(200_000_000)
        time.sleep(60)
        return len(filled)

@ray.remote(max_retries=0, num_cpus=0)
def kill(): os.kill(os.getpid(), signal.SIGKILL)

@ray.remote(max_retries=0, num_cpus=0)
def fill():
    filled = bytearray(200_000_000)
    time.sleep(60)

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
told = {}
for name in sys.argv[1:]:
    in_task = name.startswith("task_")
    asked = globals()[name[5:]] if in_task else getattr(Worker.remote(), name)
    try:
        ray.get(asked.remote(), timeout=100)
    except Exception as error:
        cause = cause_of(error)
        told[name] = [int(cause.kind), cause.text]
print("TOLD", json.dumps(told))
"""


def told_of(*ends: str, **settings: str) -> dict[str, tuple[Kind, str]]:
    """What is told of each of these ends, under a Ray with these settings."""
    ran = subprocess.run(
        [sys.executable, "-c", ENDS, *ends],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    line = next((line for line in ran.stdout.splitlines() if line.startswith("TOLD ")), None)
    assert line is not None, ran.stderr[-3000:]
    return {name: (Kind(kind), text) for name, (kind, text) in json.loads(line[5:]).items()}


def test_of_every_end_of_a_process_the_cause_is_told() -> None:
    ends = ("stall", "leave", "kill", "fail", "task_kill")
    told = told_of(*ends, RAY_memory_monitor_refresh_ms="0")
    # What ends by itself and what is killed look alike to Ray, but for a plain exit.
    assert {name: kind for name, (kind, _) in told.items()} == {
        "stall": Kind.KILLED,
        "leave": Kind.STALL,
        "kill": Kind.KILLED,
        "fail": Kind.OTHER,
        "task_kill": Kind.KILLED,
    }, told
    assert told["fail"][1] == "ValueError: one"
    assert " on " in told["kill"][1]


def test_of_what_ray_s_memory_monitor_ends_memory_is_told() -> None:
    # With so low a threshold it ends whatever works for longer than a moment.
    settings = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    told = told_of("fill", "task_fill", **settings)
    assert {name: kind for name, (kind, _) in told.items()} == {
        "fill": Kind.MEMORY,
        "task_fill": Kind.MEMORY,
    }, told
    assert all("GB of " in text and " on " in text for _, text in told.values())
