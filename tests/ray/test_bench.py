"""The benches of the data path run on a job's own shards and name what they measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cat_ray.data.prepare import digits, prepare
from cat_ray.section import Storage

COMMAND = str(Path(sys.executable).with_name("cat-ray"))


@pytest.fixture
def job(job_file: Path, tmp_path: Path) -> Path:
    prepare(digits(f"{tmp_path}/shards", Storage()))
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
