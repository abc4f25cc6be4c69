"""`cat-ray sample JOB` on a real Ray: the samples that `cat-ray fid` measures, killed or not."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from cat_ray.config import load
from cat_ray.connection import connected
from cat_ray.evaluation.fid import fid
from cat_ray.evaluation.measurement import Measurement, Sampling
from cat_ray.evaluation.sample_set import make_samples
from cat_ray.storage import Location

COMMAND = str(Path(sys.executable).with_name("cat-ray"))
SAMPLES = 2500
WAIT_SECONDS = 300


def files(folder: Path) -> dict[str, bytes]:
    """The PNG files of all samples, by name."""
    (pngs,) = folder.glob("*-png")
    return {path.name: path.read_bytes() for path in pngs.iterdir()}


def test_samples_are_those_that_are_measured_even_after_a_kill(
    tmp_path: Path, checkpoint: Location, digit_shards: Path
) -> None:
    values: dict[str, Any] = {
        "samples": {"checkpoint": checkpoint.uri, "count": SAMPLES, "seed": 3},
        "output": {"folder": f"{tmp_path}/measured", "png": True},
    }
    features = {"network": "pixels"}
    with connected(2, {}):
        measured, _ = fid(Measurement(**values, features=features, reference=str(digit_shards)))

    folder, job = tmp_path / "sampled", tmp_path / "sample.yaml"
    job.write_text(yaml.safe_dump(values | {"output": {"folder": str(folder), "png": True}}))
    driver = subprocess.Popen([COMMAND, "sample", job], stdout=subprocess.PIPE, stderr=sys.stdout)
    until = time.monotonic() + WAIT_SECONDS
    while not (ranges := list(folder.glob("ranges-*/*[0-9].safetensors"))):
        assert driver.poll() is None and time.monotonic() < until, "no range came"
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    assert not list(folder.glob("*.json")), "it was over before the kill"
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*-png/000000.png")}

    again = [COMMAND, "sample", job, "--set", "workers.count=2"]
    done = subprocess.run(again, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (place,) = folder.glob("*.json")
    assert "2,500 samples, " in done.stdout and str(place) in done.stdout.replace("\n", "")
    made = json.loads(place.read_text())
    assert made["pixels_sha256"] == measured.pixels_sha256
    assert files(folder) == files(tmp_path / "measured")
    assert {path: path.stat().st_mtime_ns for path in written} == written, "it was made again"
    assert not ranges[0].exists(), "ranges stay after the end"
    assert place.with_suffix(".png").exists()
    assert made["subject"] == measured.subject and made["subject"]["seed"] == 3
    assert made["protocol"].items() <= measured.protocol.items()
    assert made["figures"].items() <= measured.figures.items() and made["figures"]

    # Without Ray: what is there is only read.
    assert asdict(make_samples(load(str(job), kind=Sampling))[0]) == made
