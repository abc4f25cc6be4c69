"""Signals to more than the command: its process group, its terminal, every process below it."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest

from cat_ray.checkpoint.read import newest, read_state, verify
from cat_ray.operations.journal import read_rows
from cat_ray.storage import locate

pytestmark = pytest.mark.usefixtures("heeds_hang_up", "digit_shards")
COMMAND = str(Path(sys.executable).with_name("cat-ray"))
WAIT_SECONDS = 300
# The agents of a raylet look every few seconds whether it is there.
GONE_SECONDS = 30


def until_saved(process: subprocess.Popen, run: Path, log: Path) -> list[psutil.Process]:
    """Waits for the first checkpoint; all processes that there are below the command then."""
    until = time.monotonic() + WAIT_SECONDS
    while newest(locate(str(run))) is None:
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.1)
    return psutil.Process(process.pid).children(recursive=True)


def send_to_all(processes: list[psutil.Process], number: signal.Signals) -> None:
    """As systemd and Slurm do it."""
    for process in processes:
        process.send_signal(number)


@pytest.mark.parametrize("to", [pytest.param("group", marks=pytest.mark.long), "terminal", "all"])
def test_a_signal_to_more_than_the_command_saves(to: str, job_file: Path, tmp_path: Path) -> None:
    job_file.write_text(job_file.read_text().replace("total_images: 64", "total_images: 64000"))
    run, log = tmp_path / "run", tmp_path / "log"
    command = [COMMAND, "train", str(job_file)]
    if to == "group":
        # It sends what it gets to the command, and then to its whole group.
        command = ["timeout", "3600", *command]
    terminal, output = pty.openpty() if to == "terminal" else (None, os.open(log, os.O_CREAT | 1))
    process = subprocess.Popen(
        command,
        stdin=output if to == "terminal" else None,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY) if to == "terminal" else None,
    )
    os.close(output)
    below = until_saved(process, run, log)
    assert any("raylet" in each.name() for each in below)
    if terminal is not None:
        os.close(terminal)
    elif to == "group":
        os.kill(process.pid, signal.SIGTERM)
    else:
        send_to_all([psutil.Process(process.pid), *below], signal.SIGTERM)
    # `timeout` says by 124 that it ended the command only where its time was up.
    assert process.wait(timeout=WAIT_SECONDS) == 75, log.read_text()[-3000:]
    checkpoint = newest(locate(str(run)))
    assert checkpoint is not None and verify(checkpoint) == []
    images = read_state(checkpoint).images
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["exit_code"], outcome["images"]) == (
        "unfinished",
        75,
        images,
    )
    told = [row for row in read_rows(locate(str(run))) if row["kind"] == "event"]
    # The save is of the very step after which the workers stopped.
    assert told[-1]["images"] == images and "saving" in told[-1]["message"]
    assert sum("starts" in row["message"] for row in told) <= 1
    assert "***" not in log.read_text() if log.exists() else True
    assert psutil.wait_procs(below, timeout=GONE_SECONDS)[1] == []


def test_no_process_of_ray_outlives_a_killed_command(job_file: Path, tmp_path: Path) -> None:
    job_file.write_text(job_file.read_text().replace("total_images: 64", "total_images: 64000"))
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [COMMAND, "train", str(job_file)], stdout=output, stderr=output, start_new_session=True
        )
    below = until_saved(process, tmp_path / "run", log)
    # What was asked to end before, as systemd does it, is killed nevertheless.
    send_to_all(below, signal.SIGTERM)
    process.kill()
    process.wait(timeout=WAIT_SECONDS)
    assert psutil.wait_procs(below, timeout=GONE_SECONDS)[1] == []
