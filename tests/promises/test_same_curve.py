"""Promise 1, the same curve: killed, resized, stopped, rolled back, a run goes on as it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cat_ray.checkpoint.read import CheckpointReader, newest, read_state, verify
from cat_ray.config import parse
from cat_ray.operations.journal import read_rows
from cat_ray.operations.verify_resume import verify_resume
from cat_ray.storage import locate
from cat_ray.training.health import read_roll_backs

pytestmark = pytest.mark.usefixtures("digit_shards")
COMMAND = str(Path(sys.executable).with_name("cat-ray"))
WITH_NAN = Path(__file__).with_name("nan_steps.py")
WAIT_SECONDS = 300


@pytest.fixture
def long_job(job_file: Path, tmp_path: Path) -> Path:
    """A job that is far from its end whenever something happens to it."""
    text = job_file.read_text().replace("total_images: 64", "total_images: 64000")
    job_file.write_text(text)
    return job_file


def started(job: Path, log: Path, *changes: str) -> subprocess.Popen[bytes]:
    options = [part for change in changes for part in ("--set", change)]
    with log.open("w") as output:
        return subprocess.Popen(
            [COMMAND, "train", str(job), *options], stdout=output, stderr=subprocess.STDOUT
        )


def wait_for_checkpoint(driver: subprocess.Popen[bytes], run: Path, log: Path) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while newest(locate(str(run))) is None:
        assert driver.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.1)


def assert_left_a_good_checkpoint(run: Path) -> int:
    checkpoint = newest(locate(str(run)))
    assert checkpoint is not None and verify(checkpoint) == []
    images = read_state(checkpoint).images
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["exit_code"]) == ("unfinished", 75)
    assert outcome["images"] == images
    return images


def test_kills_change_no_bit_and_resizes_little_more_than_rounding(tiny_job: str) -> None:
    compared = verify_resume(parse(tiny_job, "job"))
    for row in compared:
        print(row)
    assert all(row.same for row in compared), [row for row in compared if not row.same]
    named = {row.what for row in compared}
    assert {"images seen", "samples", "random streams", "generator", "discriminator"} <= named
    assert {"generator.average-0.9", "generator.average-0.5"} <= named
    assert {"generator.moments", "discriminator.moments"} <= named


# With others, the driver gets it in ray/test_signals.py.
@pytest.mark.parametrize("who", [pytest.param("driver", marks=pytest.mark.long), "worker"])
def test_a_termination_signal_costs_nothing_beyond_the_running_step(
    who: str, long_job: Path, tmp_path: Path, train_workers
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    driver = started(long_job, log)
    wait_for_checkpoint(driver, run, log)
    if who == "driver":
        os.kill(driver.pid, signal.SIGTERM)
    else:
        os.kill(train_workers(driver.pid)[0].pid, signal.SIGTERM)
    assert driver.wait(timeout=WAIT_SECONDS) == 75, log.read_text()[-3000:]
    images = assert_left_a_good_checkpoint(run)
    told = [row for row in read_rows(locate(str(run))) if row["kind"] == "event"]
    # The save is of the very step after which the group gave way.
    assert told[-1]["images"] == images and "saving" in told[-1]["message"]
    assert "run the same command again" in log.read_text()


# The default run goes back in distributed/test_loop.py, and tells of it in unit/test_outcome.py.
@pytest.mark.long
def test_a_sick_gan_goes_back_with_other_noise_and_says_why(long_job: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    # From the first steps on R1 is above this: every step is bad, and none may be saved.
    driver = started(long_job, log, "health={penalty: 1.0e-12, bad_steps: 3, max_rollbacks: 1}")
    assert driver.wait(timeout=WAIT_SECONDS) == 1, log.read_text()[-3000:]
    text = log.read_text()
    assert "to the beginning: the discriminator is too steep" in text
    assert "The run goes on with fresh noise, stream 1." in text
    assert "rolled back 2 times, health.max_rollbacks is 1" in text
    assert "Traceback" not in text
    assert newest(locate(str(run))) is None
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 1)


# The default run has the same in distributed/test_loop.py, without Ray.
@pytest.mark.long
def test_a_nan_in_a_step_that_saves_and_in_the_last_one_is_neither_saved_nor_the_end(
    job_file: Path, tmp_path: Path
) -> None:
    # At ZeRO 0 a NaN is in the weights for good. Everything is due in the same steps.
    changes = (
        "health={bad_steps: 2, max_rollbacks: 2}",
        "checkpoints={save_every_images: 32, keep: 9}",
        "reporting={log_every_images: 32, grid_every_images: 32}",
        "evaluation={protocol: classifier, every_images: 32, samples: 100}",
        *(f"optimisation.{name}.zero_stage=0" for name in ("generator", "discriminator")),
    )
    options = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, str(WITH_NAN), "0@32,1@64", "train", str(job_file), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=2 * WAIT_SECONDS)
    assert ended.returncode == 0, ended.stderr[-3000:]
    run = locate(str(tmp_path / "run"))
    went_back = [(each.images, each.to_images) for each in read_roll_backs(run)]
    assert went_back == [(48, 0), (64, 32)]
    assert all("not finite" in each.reason for each in read_roll_backs(run))
    saved = list((run / "checkpoints").folders())
    assert [read_state(each).images for each in saved] == [32, 64]
    for reader in map(CheckpointReader, saved):
        for group in {piece.group for piece in reader.manifest.slices}:
            assert all(values.isfinite().all() for values in reader.tensors(group).values())
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["images"]) == ("finished", 64)
