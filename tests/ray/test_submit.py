"""Jobs sent to a real head node: to the end, killed and tried again, stopped with a checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cat_ray.checkpoint.read import newest, read_state, verify
from cat_ray.storage import locate

pytestmark = pytest.mark.usefixtures("digit_shards")
BIN = Path(sys.executable).parent
TOKEN, OTHER_TOKEN = 32 * "0a", 32 * "0b"
WAIT_SECONDS = 300
# Whose start takes less than that of two.
ONE_WORKER = ("workers.minimum=1", "workers.maximum=1")


@dataclass
class Head:
    """A cluster of one node, with token authentication."""

    address: str
    folder: Path

    def cat_ray(self, *arguments: str, token: str = TOKEN) -> list[str]:
        command, *rest = arguments
        return [
            "env",
            # Ignored in what runs in the background of a script.
            "--default-signal=INT",
            f"RAY_AUTH_TOKEN={token}",
            str(BIN / "cat-ray"),
            command,
            *rest,
            "--address",
            self.address,
        ]

    def driver(self) -> int | None:
        """The process that runs the job, if one does."""
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = place.read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"cat_ray" in words and any(str(self.folder).encode() in word for word in words):
                return int(place.parent.name)
        return None


def wait_for(what: str, there: Callable[[], object]) -> None:
    waited_until = time.monotonic() + WAIT_SECONDS
    while not there():
        assert time.monotonic() < waited_until, f"{what} didn't come"
        time.sleep(0.05)


def tools_without_python(folder: Path) -> Path:
    """A folder with all commands of PATH but Python's."""
    folder.mkdir()
    for place in map(Path, os.get_exec_path()):
        for tool in place.iterdir() if place.is_dir() else ():
            if not tool.name.startswith("python") and not (folder / tool.name).is_symlink():
                (folder / tool.name).symlink_to(tool)
    return folder


@pytest.fixture(scope="module")
def head(new_port: Callable[[], int]) -> Iterator[Head]:
    # The path of a unix socket has room for 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    dashboard_port = new_port()
    ports = {
        "port": new_port(),
        "dashboard-port": dashboard_port,
        "ray-client-server-port": new_port(),
        "dashboard-agent-listen-port": new_port(),
        "min-worker-port": 0,
        "max-worker-port": 0,
    }
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
    options = [*(f"--{name}={value}" for name, value in ports.items()), f"--temp-dir={folder}"]
    environment = {
        **os.environ,
        # As where `ray start` was called by its path: no python of this PATH has Ray.
        "PATH": str(tools_without_python(folder / "tools")),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options], stdout=log, stderr=log, env=environment, start_new_session=True
        )
    started = Head(f"http://127.0.0.1:{dashboard_port}", folder)
    try:
        listed = started.cat_ray("status", "--json")
        wait_for(
            f"the head node of {folder}",
            lambda: subprocess.run(listed, capture_output=True, text=True).stdout == "[]\n",
        )
        yield started
    finally:
        # A cluster that is asked to end takes half a minute for it.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=WAIT_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def call(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_a_submitted_job_whose_driver_is_killed_is_tried_again_and_ends(
    head: Head, job_file: Path, tmp_path: Path
) -> None:
    values = ("run.total_images=320", "data.shards=shards", *ONE_WORKER)
    changes = [part for value in values for part in ("--set", value)]
    # Relative paths are below the folder of who submits.
    run = locate(f"{tmp_path}/killed")
    followed = ("--follow", "--retries", "1", "--run-name", "night")
    with (tmp_path / "log").open("w+") as log:
        follower = subprocess.Popen(
            head.cat_ray(
                "submit", "job.yaml", *followed, *changes, "--set", f"run.folder={run.path}"
            ),
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
        )
        wait_for("a checkpoint", lambda: newest(run) or follower.poll() is not None)
        driver = head.driver()
        assert driver is not None, log.name
        os.kill(driver, signal.SIGKILL)
        assert follower.wait(timeout=WAIT_SECONDS) == 0, (tmp_path / "log").read_text()
    told = (tmp_path / "log").read_text()
    assert "-1 ended: killed by SIGKILL; retry 1 of 1" in told
    assert "320 images 100%" in told
    assert "-2 ended: finished" in told.splitlines()[-1]
    checkpoint = newest(run)
    assert checkpoint is not None and read_state(checkpoint).images == 320

    listed = json.loads(call(head.cat_ray("status", "--json"), tmp_path).stdout)
    known = {job["id"].split("-")[0]: job for job in listed}
    assert [job["state"] for job in listed] == ["killed by SIGKILL", "finished"]
    assert [job["exit_code"] for job in listed] == [137, 0]
    assert known["night"]["metadata"]["folder"] == run.path
    assert {"config_sha256", "git_commit"} <= known["night"]["metadata"].keys()


def test_a_stopped_job_leaves_a_complete_checkpoint(
    head: Head, job_file: Path, tmp_path: Path
) -> None:
    run = locate(f"{tmp_path}/run")
    values = ("run.total_images=1600000", *ONE_WORKER)
    changes = [part for value in values for part in ("--set", value)]
    submit = head.cat_ray("submit", "job.yaml", *changes)
    submitted = call(submit, tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    submission_id = submitted.stdout.strip()
    assert f"cat-ray stop {submission_id} --address {head.address}" in submitted.stderr
    wait_for("a checkpoint", lambda: newest(run))

    again = call(submit, tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith(f"cat-ray: {submission_id} is at work in {run.path}: ")
    assert len(again.stderr.splitlines()) == 1

    follower = subprocess.Popen(
        head.cat_ray("status", submission_id, "--follow"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    assert follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    assert f"{submission_id} runs on: follow it with" in follower.communicate()[1]
    assert follower.returncode == 130
    assert head.driver() is not None

    stopped = call(head.cat_ray("stop", submission_id), tmp_path)
    checkpoint = newest(run)
    assert checkpoint is not None and verify(checkpoint) == []
    assert stopped.stdout == f"{submission_id} stopped with the checkpoint {checkpoint.uri}\n", (
        stopped
    )
    assert json.loads((run / "outcome.json").read())["outcome"] == "unfinished"
    assert head.driver() is None
    followed = call(head.cat_ray("status", submission_id, "--follow"), tmp_path)
    assert followed.returncode == 75
    assert f"in the checkpoint {checkpoint.uri}" in followed.stdout


@pytest.mark.parametrize(
    ("token", "arguments", "told"),
    [
        (OTHER_TOKEN, ("status",), "refuses the token of RAY_AUTH_TOKEN"),
        (OTHER_TOKEN, ("submit", "job.yaml"), "refuses the token of RAY_AUTH_TOKEN"),
        (TOKEN, ("status", "nobody-1"), "has no job nobody-1"),
        (TOKEN, ("stop", "nobody-1"), "has no job nobody-1"),
    ],
    ids=["a token, status", "a token, submit", "an id, status", "an id, stop"],
)
def test_a_wrong_token_or_id_is_one_line(
    head: Head, job_file: Path, tmp_path: Path, token: str, arguments: tuple[str, ...], told: str
) -> None:
    refused = call(head.cat_ray(*arguments, token=token), tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"cat-ray: {head.address} {told}")
