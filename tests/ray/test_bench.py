"""The benches run on a job and name what they measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cat_ray.operations.step_times import COMMUNICATION

COMMAND = str(Path(sys.executable).with_name("cat-ray"))


@pytest.fixture
def job(job_file: Path, digit_shards: Path) -> Path:
    assert digit_shards.is_dir()
    return job_file


def bench(*arguments: str | Path) -> str:
    result = subprocess.run(
        [COMMAND, "bench", *map(str, arguments)], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_every_step_and_path_has_a_rate_and_every_worker_its_waits(job: Path) -> None:
    found = json.loads(
        bench("data", job, "--images", "200", "--cpus", "1", "--repetitions", "1", "--json")
    )
    for rates in [*found["steps"].values(), *found["paths"].values()]:
        assert len(rates) == 1 and rates[0] > 0
    assert len(found["paths"]) == 3

    shown = bench("waits", job, "--workers", "3", "--steps", "10", "--step-seconds", "0.01")
    rows = [re.findall(r"[\d.]+", line) for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert all(0 <= float(share) <= 100 for *_, share in rows)


def test_a_step_is_measured_in_every_way_part_by_part(job_file: Path, tmp_path: Path) -> None:
    one = ("--steps", "1", "--repetitions", "1")
    found = json.loads(bench("step", job_file, *one, "--workers", "2", "--json"))
    assert list(found["ways"]) == ["cat-ray, 2 workers", "plain PyTorch", "reference order"]
    both = {
        "draws",
        "batch to device",
        "G forward",
        "averages",
        "rest",
        *(f"{step} step: {part}" for step in "DG" for part in ("backward", "optimiser", "rest")),
        *(f"{step} step: D forward" for step in "DG"),
    }
    ours = {COMMUNICATION, "figures", "agreement"}
    for name, (times,) in found["ways"].items():
        assert times["parts"].keys() == (both | ours if "cat-ray" in name else both)
        assert all(seconds > 0 for seconds in times["parts"].values())
        assert times["seconds"] > 0
        assert times["memory_bytes"] > 0
        assert found["medians"][name]["share_of_peak"] > 0
    assert len(found["ratios"]) == 2
    # Needs no shards, and leaves nothing behind.
    assert list(tmp_path.iterdir()) == [job_file]


def test_a_save_that_is_waited_for_is_measured_beside_one_that_is_not(tmp_path: Path) -> None:
    arguments = ("--megabytes", "1", "--repetitions", "2", "--json")
    found = json.loads(bench("checkpoint", tmp_path / "saves", *arguments))
    assert len(found["waited"]) == len(found["stalled"]) == 2
    assert found["ratio"] > 0
