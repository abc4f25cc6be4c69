"""What `cat-ray plan` says of the quickstart is what a real run of it takes."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cat_ray.checkpoint.read import newest
from cat_ray.config import load
from cat_ray.operations.plan import Assumptions, make_plan
from cat_ray.operations.save_size import Rates
from cat_ray.storage import locate

COMMAND = str(Path(sys.executable).with_name("cat-ray"))
QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
POLL_SECONDS = 0.2


def peaks(driver: subprocess.Popen, train_workers) -> dict[int, int]:
    """The peak resident bytes of each training worker below a process, until it ends."""
    found: dict[int, int] = {}
    while driver.poll() is None:
        for process in train_workers(driver.pid):
            # Of one that ends meanwhile the status is gone, or has no peak any more.
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{process.pid}/status").read_text()
                line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
                found[process.pid] = int(line.split()[1]) * 1024
        time.sleep(POLL_SECONDS)
    return found


def test_the_quickstart_takes_the_memory_and_the_checkpoint_that_the_plan_says(
    tmp_path: Path, train_workers
):
    changes = [f"run.folder={tmp_path}/run", f"data.shards={tmp_path}/shards"]
    changes += ["run.total_images=256", "evaluation.protocol=none"]
    options = [part for change in changes for part in ("--set", change)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen([COMMAND, "train", str(QUICKSTART), *options], stderr=log)
        measured = peaks(driver, train_workers)
    assert driver.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    config = load(str(QUICKSTART), changes)
    plan = make_plan(config, Assumptions(None, 2, 8, 0.25, 1.0, Rates()))
    assert len(measured) == 2
    for peak in measured.values():
        assert plan.job.memory.total == pytest.approx(peak, rel=0.15)
    checkpoint = newest(locate(f"{tmp_path}/run"))
    assert checkpoint is not None
    size = sum(checkpoint.sizes().values())
    assert plan.checkpoint.bytes == pytest.approx(size, rel=0.02)
