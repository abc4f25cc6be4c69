"""What becomes of the processes of a Ray of this machine's own, with stand-ins for its daemons."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil
import pytest

WAIT_SECONDS = 60
# Not a shell, which unblocks what its children get.
DAEMON = """
import os, subprocess
child = subprocess.Popen(["sleep", "1000"])
print(os.getpid(), child.pid, os.getppid(), flush=True)
child.wait()
"""
COMMAND = f"""
import sys, time
from ray._private import services
from cat_ray import local_ray
from cat_ray.stop_signals import stoppable

def start(cpus, folder, reads):
    services.start_ray_process([sys.executable, "-c", {DAEMON!r}], "raylet", fate_share=True)

local_ray._start = start
with stoppable(), local_ray.local_cluster(1, None, True):
    time.sleep(1000)
"""


@pytest.fixture
def started() -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    # As a raylet and one of its agents.
    daemon, child, parent = (int(number) for number in process.stdout.readline().split())
    assert parent == process.pid
    below = psutil.Process(process.pid).children(recursive=True)
    assert {daemon, child} < {each.pid for each in below}
    yield process, below
    for each in below:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def to_group(process: subprocess.Popen, below: list[psutil.Process], number: int) -> None:
    os.killpg(process.pid, number)


def to_all(process: subprocess.Popen, below: list[psutil.Process], number: int) -> None:
    for each in below:
        each.send_signal(number)


def test_daemons_are_no_part_of_the_commands_group(started) -> None:
    process, below = started
    assert {os.getpgid(each.pid) for each in below}.isdisjoint({process.pid})
    process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_to_all_processes_leave_them_alive(started, number) -> None:
    process, below = started
    to_all(process, below, number)
    time.sleep(1)
    # One whose parent hasn't asked for it is a zombie.
    assert {each.status() for each in below} == {psutil.STATUS_SLEEPING}
    process.kill()
    assert psutil.wait_procs(below, timeout=WAIT_SECONDS)[1] == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGQUIT])
@pytest.mark.parametrize("send", [to_group, to_all])
def test_none_outlives_the_command_however_it_ended(
    started, number: int, send: Callable[..., None]
) -> None:
    process, below = started
    if number != signal.SIGKILL:
        send(process, below, signal.SIGTERM)
    process.send_signal(number)
    process.wait(timeout=WAIT_SECONDS)
    assert psutil.wait_procs(below, timeout=WAIT_SECONDS)[1] == []
