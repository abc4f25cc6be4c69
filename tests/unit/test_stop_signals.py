"""Signals that stop a command, sent to real processes."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from cat_ray.errors import Unfinished
from cat_ray.stop_signals import TOGETHER_SECONDS, stoppable, unheeded

pytestmark = pytest.mark.usefixtures("heeds_hang_up")
WAIT_SECONDS = 60
# Ends as commands do, and says what it is at, line by line.
COMMAND = """
import sys, time
from cat_ray.errors import Unfinished
from cat_ray.stop_signals import stoppable

def say(what):
    print(what, flush=True)

def wait():
    while True:
        time.sleep(0.05)

try:
    with stoppable():
        BODY
except Unfinished as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
except KeyboardInterrupt:
    sys.exit(130)
"""
INTERRUPTED = "say('ready'); wait()"
NEVER_SAVED = """with stoppable(lambda name: (say('saving'), wait())):
            say('ready'); wait()"""
NEVER_CLEANED_UP = """try:
            say('ready'); wait()
        finally:
            say('saving'); wait()"""
FORKED = """import os
        child = os.fork()
        if child == 0:
            say('ready'); say(os.getpid()); wait()
        say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])); time.sleep(0.2)"""
# A lock that is never free: the main thread runs no handler of Python's while it waits for it.
NATIVE = """import ctypes
        lock = ctypes.CDLL(None).pthread_mutex_lock
        mutex = ctypes.create_string_buffer(64)
        lock(mutex); say('ready'); lock(mutex)"""


def started(body: str, **options) -> subprocess.Popen[str]:
    code = COMMAND.replace("BODY", body)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    told = process.communicate(timeout=WAIT_SECONDS)[1]
    return process.returncode, told


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGTERM, 75, "stopped by SIGTERM: run the same command again to go on\n"),
        (signal.SIGHUP, 75, "stopped by SIGHUP: run the same command again to go on\n"),
        (signal.SIGINT, 130, ""),
    ],
)
def test_a_signal_ends_a_command_with_one_line(number, code, told):
    process = started(INTERRUPTED)
    os.killpg(process.pid, number)
    assert ended(process) == (code, told)


@pytest.mark.parametrize("body", [NEVER_SAVED, NEVER_CLEANED_UP])
@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((signal.SIGTERM, signal.SIGTERM), 75),
        ((signal.SIGHUP, signal.SIGTERM), 75),
        ((signal.SIGINT, signal.SIGINT), 130),
    ],
)
def test_a_second_signal_ends_it_at_once_and_says_so(body, numbers, code):
    process = started(body)
    os.killpg(process.pid, numbers[0])
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    # One request until here: `timeout` and systemd send two.
    os.killpg(process.pid, numbers[1])
    time.sleep(2 * TOGETHER_SECONDS)
    assert process.poll() is None
    os.killpg(process.pid, numbers[1])
    told = f"cat-ray: {numbers[1].name} again: ended at once."
    assert ended(process) == (code, f"{told} Run the same command again to go on\n")


def test_a_second_signal_ends_it_while_the_main_thread_is_in_native_code():
    process = started(NATIVE)
    while psutil.Process(process.pid).status() != psutil.STATUS_SLEEPING:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(2 * TOGETHER_SECONDS)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    code, told = ended(process)
    assert code == 75 and "SIGTERM again: ended at once" in told


def test_what_nohup_ignores_stays_ignored():
    # As nohup does it.
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = started(INTERRUPTED)
    finally:
        signal.signal(signal.SIGHUP, ignored)
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(2 * TOGETHER_SECONDS)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    assert ended(process)[0] == 75


def test_processes_started_unheeding_live_on_and_so_do_theirs():
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    # A program that sets its own handlers, as Ray's daemons do, is no exception.
    outer = f"import signal; signal.signal(signal.SIGTERM, lambda *_: exit(1)); {inner}"
    with unheeded():
        process = subprocess.Popen(
            [sys.executable, "-c", outer], stdin=subprocess.PIPE, start_new_session=True
        )
    for number in (signal.SIGTERM, signal.SIGHUP):
        os.killpg(process.pid, number)
    time.sleep(1)
    assert process.poll() is None
    process.communicate(b"\n", timeout=WAIT_SECONDS)
    assert process.returncode == 0


def test_a_signal_in_an_unheeding_block_is_for_us_afterwards():
    taken: list[int] = []
    with pytest.raises(Unfinished, match="SIGTERM"), stoppable():
        try:
            with unheeded():
                signal.signal(signal.SIGTERM, lambda number, _: taken.append(number))
                signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        finally:
            time.sleep(0.1)
    assert taken == []


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stoppable(), stoppable(print):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_what_comes_between_two_blocks_ends_the_next_one():
    with pytest.raises(Unfinished, match="SIGTERM"), stoppable():
        told = threading.Event()
        with stoppable(lambda name: told.set()):
            os.kill(os.getpid(), signal.SIGTERM)
            assert told.wait(WAIT_SECONDS)
        with stoppable():
            raise AssertionError("it began")


def test_a_signal_to_a_forked_process_is_not_the_parents():
    process = started(FORKED)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    os.kill(child, signal.SIGTERM)
    assert process.stdout.readline() == f"{-signal.SIGTERM}\n"
    assert ended(process) == (0, "")


@pytest.mark.parametrize("closed", ["terminal", "pipe"])
def test_output_that_nobody_reads_any_more_ends_nothing(closed):
    ours, theirs = pty.openpty() if closed == "terminal" else os.pipe()
    code = COMMAND.replace("BODY", "say('ready'); input(); say('more')")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    told = b""
    while not told.endswith(b"\n"):
        told += os.read(ours, 64)
    os.close(ours)
    until = time.monotonic() + WAIT_SECONDS
    while Path(f"/proc/{process.pid}/fd/1").readlink() != Path(os.devnull):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert process.communicate("\n", timeout=WAIT_SECONDS)[1] == ""
    assert process.returncode == 0
