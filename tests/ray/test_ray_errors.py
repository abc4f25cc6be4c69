"""Failures of a real Ray, and what is told of them: its texts may change with its version."""

import json
import subprocess
import sys

from cat_ray.ray_errors import Kind

# With so low a threshold Ray's monitor ends whatever works for longer than a moment.
ENDS = """
import json, os, signal, sys, time
os.environ["RAY_memory_usage_threshold"] = "0.01"
os.environ["RAY_memory_monitor_refresh_ms"] = "100"
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
def killed(): os.kill(os.getpid(), signal.SIGKILL)

@ray.remote(max_retries=0, num_cpus=0)
def filled():
    filled = bytearray(200_000_000)
    time.sleep(60)

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
asked = {name: getattr(Worker.remote(), name).remote() for name in
         ("stall", "leave", "kill", "fail")}
asked |= {"task": killed.remote()}
told = {}
def wait(name, reference):
    try:
        ray.get(reference, timeout=100)
    except Exception as error:
        cause = cause_of(error)
        told[name] = [int(cause.kind), cause.text]
for name, reference in asked.items():
    wait(name, reference)
wait("fill", Worker.remote().fill.remote())
wait("fill_task", filled.remote())
print("TOLD", json.dumps(told))
"""


def test_of_every_end_of_a_process_the_cause_is_told() -> None:
    ran = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=300)
    line = next((line for line in ran.stdout.splitlines() if line.startswith("TOLD ")), None)
    assert line is not None, ran.stderr[-3000:]
    told = {name: (Kind(kind), text) for name, (kind, text) in json.loads(line[5:]).items()}
    # What ends by itself and what is killed look alike to Ray, but for a plain exit.
    assert {name: kind for name, (kind, _) in told.items()} == {
        "stall": Kind.KILLED,
        "leave": Kind.STALL,
        "kill": Kind.KILLED,
        "fail": Kind.OTHER,
        "task": Kind.KILLED,
        "fill": Kind.MEMORY,
        "fill_task": Kind.MEMORY,
    }, told
    assert told["fail"][1] == "ValueError: one"
    assert "GB of " in told["fill"][1] and " on " in told["kill"][1]
