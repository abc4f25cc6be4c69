"""A job in two phases on a real Ray cluster: killed in each, the same command goes on with it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cat_ray.checkpoint.layout import STATE, read_manifest
from cat_ray.checkpoint.read import newest, read_config, read_state
from cat_ray.operations.journal import read_rows
from cat_ray.storage import Location, locate

pytestmark = pytest.mark.usefixtures("digit_shards")
COMMAND = str(Path(sys.executable).with_name("cat-ray"))
KILL_AFTER_SECONDS = 600
PHASE_IMAGES = 320
SCHEDULE = """
schedule:
  - images: 320
    set: {model.resolution: 16, model.generator.patch: 2, model.discriminator.patch: 2}
  - images: 320
"""


def command(job: Path, folder: Path) -> list[str]:
    return [COMMAND, "train", str(job), "--set", f"run.folder={folder}"]


def killed_once(begun: Location, job: Path, folder: Path) -> int:
    """Starts the job and kills it when a run has a checkpoint; how many images that has seen."""
    with (folder.parent / "log").open("a") as log:
        driver = subprocess.Popen(command(job, folder), stdout=log, stderr=log)
        waited_until = time.monotonic() + KILL_AFTER_SECONDS
        while newest(begun) is None:
            assert driver.poll() is None and time.monotonic() < waited_until, "no checkpoint came"
            time.sleep(0.05)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    stopped = newest(begun)
    assert stopped is not None
    return read_state(stopped).images


def hashes(run: Location) -> dict[str, str]:
    """The newest checkpoint's tensors; the state holds paths, which differ."""
    checkpoint = newest(run)
    assert checkpoint is not None and read_state(checkpoint).images == PHASE_IMAGES
    records = read_manifest(checkpoint) or ()
    return {record.name: record.sha256 for record in records if record.name != STATE}


@pytest.mark.parametrize("killed_in", [(2,), pytest.param((1, 2), marks=pytest.mark.long)])
def test_a_kill_in_any_phase_changes_no_bit_of_a_job_in_phases(
    killed_in: tuple[int, ...], job_file: Path, tmp_path: Path
) -> None:
    text = job_file.read_text().replace("total_images: 64", f"total_images: {2 * PHASE_IMAGES}")
    job_file.write_text(text + SCHEDULE)
    folder = tmp_path / "run"
    first, second = (locate(f"{folder}/phase-{number}") for number in (1, 2))
    for number in killed_in:
        begun = (first, second)[number - 1]
        assert killed_once(begun, job_file, folder) < PHASE_IMAGES, "it was over before the kill"
    assert newest(first) is not None and not (folder / "outcome.json").exists()
    again = subprocess.run(command(job_file, folder), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "phase 1 of 2, 320 images: was trained to its end before" in again.stderr
    outcome = json.loads((folder / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["images"]) == ("finished", 2 * PHASE_IMAGES)

    checkpoint = newest(second)
    ended = newest(first)
    assert checkpoint is not None and ended is not None
    resolved = read_config(checkpoint)
    assert (resolved.model.resolution, resolved.run.initialise_from) == (32, ended.uri)
    starts = [row["message"] for row in read_rows(second) if row["kind"] == "event"]
    assert starts[0].endswith(f"from the beginning, with the weights of {ended.uri}")
    assert "from the checkpoint at" in starts[-1]

    undisturbed = tmp_path / "undisturbed"
    whole = subprocess.run(command(job_file, undisturbed), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-3000:]
    for number, run in enumerate((first, second), start=1):
        assert hashes(run) == hashes(locate(f"{undisturbed}/phase-{number}"))
