"""Promise 2, each image once: whatever befalls workers and nodes, and whoever announces it."""

import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cat_ray.checkpoint.read import newest, read_state
from cat_ray.config import parse
from cat_ray.operations.drill import drill
from cat_ray.operations.journal import read_rows
from cat_ray.storage import locate
from cat_ray.training.faults import parse_schedule

pytestmark = pytest.mark.usefixtures("digit_shards")
COMMAND = str(Path(sys.executable).with_name("cat-ray"))


def drilled(job: str, schedule: str, *changes: str) -> dict[str, int]:
    """Drills, prints what came of it, and returns the images done again after each fault."""
    found = drill(parse(job, "job", changes), parse_schedule(schedule))
    for recovery in found.recoveries:
        print(recovery)
    for promise in found.promises:
        print(promise)
    assert found.passed, found
    return {recovery.fault.kind: recovery.lost_images for recovery in found.recoveries}


def test_faults_of_workers_lose_and_double_no_image(tiny_job: str) -> None:
    lost = drilled(
        tiny_job,
        "raise@80,kill@176:1,stop@272:1,refuse@336,truncate@400",
        "run.total_images=512",
        "workers={minimum: 2, maximum: 2, cpus_per_worker: 0.5, stall_seconds: 15}",
    )
    # What came after the last save is done again; after the one before it, where the last one was
    # still on its way when the worker died.
    assert all(lost[kind] in (16, 48) for kind in ("raise", "kill", "stop"))
    assert lost["refuse"] == 0
    # The newest checkpoint was damaged: the one before it was used.
    assert 32 <= lost["truncate"] <= 64


def test_nodes_that_go_and_come_lose_and_double_no_image(tiny_job: str) -> None:
    lost = drilled(
        tiny_job,
        "remove@80:1,add@176,drain@1616:1",
        "run.total_images=1920",
        "workers={minimum: 1, maximum: 2, cpus_per_worker: 0.5, resize_check_seconds: 1}",
        "reporting.log_every_images=320",
    )
    assert lost["add"] == lost["drain"] == 0
    # A killed node's worker may live for seconds, and with it the group, past the next save.
    assert lost["remove"] <= 48


class InterruptionNotice(http.server.BaseHTTPRequestHandler):
    """AWS's metadata service of a machine that is about to be taken away, once it is told to."""

    coming = False

    def do_PUT(self) -> None:
        self._answer(200, "token")

    def do_GET(self) -> None:
        if not type(self).coming:
            return self._answer(404, "")
        at = datetime.now(UTC) + timedelta(seconds=120)
        notice = {"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}
        self._answer(200, json.dumps(notice))

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata_url() -> Iterator[str]:
    InterruptionNotice.coming = False
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), InterruptionNotice) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_clouds_notice_saves_and_ends_the_run_where_the_driver_goes_too(
    job_file: Path, tmp_path: Path, metadata_url: str
) -> None:
    run = locate(f"{tmp_path}/run")
    changes = (
        "run.total_images=64000",
        f"preemption={{cloud: aws, metadata_url: '{metadata_url}', poll_seconds: 0.2}}",
    )
    options = [part for change in changes for part in ("--set", change)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(
            [COMMAND, "train", str(job_file), *options], stdout=log, stderr=log
        )
    until = time.monotonic() + 300
    while newest(run) is None:
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    InterruptionNotice.coming = True
    assert driver.wait(timeout=300) == 75, (tmp_path / "log").read_text()[-3000:]
    told = [row for row in read_rows(run) if row["kind"] == "event"][-1]
    assert "AWS" in told["message"] and "saving" in told["message"]
    checkpoint = newest(run)
    assert checkpoint is not None and read_state(checkpoint).images == told["images"]
