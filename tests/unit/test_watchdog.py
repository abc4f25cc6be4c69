"""A worker whose step stalls ends and tells where it hung; one that works is left alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.training.watchdog import EXIT_STALLED, LOOKS, STACKS, Watchdog, stacks

# Far more than a process here needs to come to its end.
PATIENCE_SECONDS = 120
few = settings(max_examples=200, deadline=None, derandomize=True)


class Script:
    """A watchdog that allows `LOOKS` seconds, and so looks every second, on a clock set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.watchdog = Watchdog(float(LOOKS), pytest.fail, lambda: self.now)

    def looks(self, *after_seconds: float) -> list[bool]:
        """What it sees at each wake-up, so many seconds after the one before."""
        seen = []
        for seconds in after_seconds:
            self.now += seconds
            seen.append(self.watchdog.look())
        return seen


IN_TIME = [1.0] * (LOOKS - 1)
GOOD, STALLED = [False] * (LOOKS - 1), [True]


@pytest.fixture
def script() -> Script:
    return Script()


# When a step has stalled.


def test_nothing_is_due_before_the_first_beat(script):
    assert script.looks(*[1.0] * 10 * LOOKS) == [False] * 10 * LOOKS


def test_a_step_stalls_when_its_allowance_ends_and_not_before(script):
    script.watchdog.beat()
    assert script.looks(*IN_TIME, 1.0) == GOOD + STALLED


def test_nothing_is_due_while_resting_and_the_next_step_has_its_full_allowance(script):
    script.watchdog.beat()
    script.looks(*IN_TIME)
    with script.watchdog.resting():
        assert script.looks(*[1.0] * 5 * LOOKS) == [False] * 5 * LOOKS
    assert script.looks(*IN_TIME, 1.0) == GOOD + STALLED


def test_a_rest_ends_where_the_outermost_ends(script):
    script.watchdog.beat()
    with script.watchdog.resting():
        with script.watchdog.resting():
            pass
        script.watchdog.beat()
        assert script.looks(*IN_TIME, 1.0) == [False] * LOOKS
    assert script.looks(*IN_TIME, 1.0) == GOOD + STALLED


def test_a_rest_that_fails_ends(script):
    script.watchdog.beat()
    with pytest.raises(OSError), script.watchdog.resting():
        raise OSError
    assert script.looks(*IN_TIME, 1.0) == GOOD + STALLED


@pytest.mark.parametrize("stopped_seconds", [2.5, 10.0, 1e6])
def test_a_process_that_was_stopped_has_a_fresh_allowance_and_can_still_stall(
    script, stopped_seconds
):
    script.watchdog.beat()
    assert script.looks(*IN_TIME, stopped_seconds) == [False] * LOOKS
    assert script.looks(*IN_TIME, 1.0) == GOOD + STALLED


def test_a_wake_up_that_is_only_a_little_late_grants_nothing(script):
    script.watchdog.beat()
    assert script.looks(*[1.9] * 5, 1.9) == [False] * 5 + STALLED


actions = st.lists(
    st.sampled_from(["beat", "rest", "wake up"])
    | st.tuples(st.just("work"), st.integers(1, 12))
    | st.tuples(st.just("stopped"), st.integers(3, 10_000)),
    max_size=30,
)


@few
@given(actions=actions)
def test_a_step_stalls_exactly_when_it_was_watched_for_its_whole_allowance(actions):
    script, rests = Script(), ExitStack()
    armed, resting, watched = False, False, 0
    for action in actions:
        match action:
            case "beat":
                script.watchdog.beat()
                armed, watched = True, 0
            case "rest":
                rests.enter_context(script.watchdog.resting())
                resting = True
            case "wake up":
                rests.close()
                watched = 0 if resting else watched
                resting = False
            case "work", seconds:
                due = range(watched + 1, watched + 1 + seconds)
                expected = [armed and not resting and second >= LOOKS for second in due]
                assert script.looks(*[1.0] * seconds) == expected
                watched += seconds
            case "stopped", seconds:
                assert script.looks(float(seconds)) == [False]
                watched = 0


# The stacks.


def test_the_stacks_are_those_of_every_thread_with_its_name():
    end, begun = threading.Event(), threading.Event()

    def waits_for_the_end() -> None:
        begun.set()
        end.wait()

    reader = threading.Thread(target=waits_for_the_end, name="reader", daemon=True)
    reader.start()
    begun.wait()
    parts = stacks().split("thread ")
    end.set()
    reader.join()
    assert any(part.startswith("reader:") and "waits_for_the_end" in part for part in parts)
    assert any(part.startswith("MainThread:") and "stacks()" in part for part in parts)


# Real threads and processes.


def test_a_stall_is_told_once_with_the_stacks_and_the_allowance():
    told: list[str] = []
    with Watchdog(0.3, told.append) as watchdog:
        watchdog.beat()
        (watching,) = (thread for thread in threading.enumerate() if thread.name == "watchdog")
        watching.join(PATIENCE_SECONDS)
    assert len(told) == 1
    assert told[0].startswith("no training step ended within 0.3 seconds\n")
    assert "thread MainThread:" in told[0]
    assert "watching.join(PATIENCE_SECONDS)" in told[0]


def test_nobody_watches_after_the_end():
    with Watchdog(600, pytest.fail) as watchdog:
        watchdog.beat()
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def worker(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """A process of its own that runs this code, with the watchdog's names at hand."""
    path = tmp_path / "worker_code.py"
    path.write_text(
        "import os, signal, sys, threading, time\n"
        "from cat_ray.storage import locate\n"
        "from cat_ray.training import watchdog\n"
        "from cat_ray.training.watchdog import Watchdog, end_process\n" + body
    )
    arguments = [sys.executable, str(path), str(tmp_path / "run")]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a process; one that doesn't end is killed and fails."""
    try:
        output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    return process.returncode, output, errors


HANGS = """
def steps(watchdog):
    watchdog.beat()
    time.sleep(100_000)  # the line that hangs

with Watchdog(0.3, end_process(RUN, 3)) as watchdog:
    steps(watchdog)
print("went on")
"""


def test_a_worker_that_hangs_ends_and_leaves_the_line_that_hangs(tmp_path):
    began = int(time.time())
    code, output, errors = finish(worker(tmp_path, f"RUN = locate(sys.argv[1])\n{HANGS}"))
    assert (code, output) == (EXIT_STALLED, "")
    (left,) = (tmp_path / "run" / STACKS).iterdir()
    at, rank = left.name.split("-", 1)
    assert rank == "rank-3.txt"
    assert int(at) >= began
    text = left.read_text()
    assert text in errors
    assert "no training step ended within 0.3 seconds" in text
    assert "thread MainThread:" in text
    assert "time.sleep(100_000)  # the line that hangs" in text
    assert "in steps\n" in text


REFUSES = """
open(sys.argv[1], "w").close()
RUN = locate(sys.argv[1])
"""
NEVER_ANSWERS = """
watchdog.REPORT_SECONDS = 0.3

class Stuck:
    def __truediv__(self, name):
        return self

    def write(self, content):
        time.sleep(100_000)

RUN = Stuck()
"""


@pytest.mark.parametrize("storage", [REFUSES, NEVER_ANSWERS], ids=["refuses", "never answers"])
def test_storage_that_fails_keeps_no_worker_alive_and_the_stacks_are_on_stderr(tmp_path, storage):
    code, output, errors = finish(worker(tmp_path, storage + HANGS))
    assert (code, output) == (EXIT_STALLED, "")
    assert "time.sleep(100_000)  # the line that hangs" in errors


NO_THREAD_LEFT = """
RUN = locate(sys.argv[1])
start = threading.Thread.start
threading.Thread.start = lambda self: start(self) if self.name == "watchdog" else 1 / 0
"""


def test_a_worker_that_can_start_no_thread_for_the_stacks_ends_as_well(tmp_path):
    assert finish(worker(tmp_path, NO_THREAD_LEFT + HANGS))[:2] == (EXIT_STALLED, "")


ALLOWANCE_SECONDS = 2.0
STOPS_ITSELF = f"""
looked = threading.Semaphore(0)

class Heard(Watchdog):
    def look(self):
        stalled = super().look()
        looked.release()
        return stalled

with Heard({ALLOWANCE_SECONDS}, end_process(locate(sys.argv[1]), 0)) as watchdog:
    watchdog.beat()
    os.kill(os.getpid(), signal.SIGSTOP)
    # The step goes on until the watchdog has surely looked at it, within its allowance.
    while looked.acquire(blocking=False):
        pass
    looked.acquire()
    looked.acquire()
    watchdog.beat()
print("survived")
"""


def test_a_healthy_worker_survives_being_stopped_for_longer_than_a_step_may_take(tmp_path):
    process = worker(tmp_path, STOPS_ITSELF)
    # WNOWAIT leaves the news for Popen; a worker that doesn't stop is ended by its own watchdog.
    news = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert news is not None
    assert news.si_code == os.CLD_STOPPED
    time.sleep(2 * ALLOWANCE_SECONDS)
    process.send_signal(signal.SIGCONT)
    assert finish(process) == (0, "survived\n", "")
    assert not (tmp_path / "run").exists()
