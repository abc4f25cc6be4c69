"""`cat-ray train` on a real Ray cluster with two workers: start, stop, go on, on disk and on S3."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from cat_ray.checkpoint.layout import STATE, read_manifest
from cat_ray.checkpoint.read import newest, read_state
from cat_ray.checkpoint.retain import read_best
from cat_ray.config import Workers
from cat_ray.operations.journal import read_rows
from cat_ray.storage import Location, locate
from cat_ray.training.process import worker_environment

pytestmark = pytest.mark.usefixtures("digit_shards")
COMMAND = str(Path(sys.executable).with_name("cat-ray"))
KILL_AFTER_SECONDS = 600


def train(job: Path, *changes: str) -> subprocess.CompletedProcess[str]:
    options = [part for change in changes for part in ("--set", change)]
    return subprocess.run([COMMAND, "train", str(job), *options], capture_output=True, text=True)


def tensor_hashes(run: Location) -> dict[str, str]:
    """The newest checkpoint's files by hash; the state holds paths, which differ."""
    checkpoint = newest(run)
    assert checkpoint is not None
    records = read_manifest(checkpoint)
    assert records is not None
    return {record.name: record.sha256 for record in records if record.name != STATE}


def test_neither_a_kill_nor_measurements_beside_it_change_a_run(
    job_file: Path, tmp_path: Path, train_workers
) -> None:
    changes = (
        "run.total_images=320",
        "evaluation={protocol: classifier, every_images: 160, samples: 100}",
    )
    undisturbed = train(job_file, *changes, f"run.folder={tmp_path}/undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]

    run = locate(f"{tmp_path}/run")
    fid = "{every_images: 160, samples: {count: 1200}, features: {network: pixels}}"
    changes = (*changes, f"evaluation.fid={fid}")
    options = [part for change in changes for part in ("--set", change)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(
            [COMMAND, "train", str(job_file), *options], stdout=log, stderr=log
        )
        waited_until = time.monotonic() + KILL_AFTER_SECONDS
        while newest(run) is None:
            assert driver.poll() is None and time.monotonic() < waited_until, "no checkpoint came"
            time.sleep(0.05)
        began_with = [process.environ() for process in train_workers(driver.pid)]
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    stopped = newest(run)
    assert stopped is not None and read_state(stopped).images < 320, "it was over before the kill"
    assert len(began_with) == 2
    assert all(worker_environment(Workers()).items() <= found.items() for found in began_with)

    again = train(job_file, *changes)
    assert again.returncode == 0, again.stderr[-3000:]
    assert tensor_hashes(run) == tensor_hashes(locate(f"{tmp_path}/undisturbed"))
    figures = [
        [row for row in read_rows(place) if row["kind"] == "evaluation"]
        for place in (run, locate(f"{tmp_path}/undisturbed"))
    ]
    for row in figures[0] + figures[1]:
        del row["session"]
    assert figures[0] == figures[1]
    assert [row["images"] for row in figures[0]] == [0, 160, 320]

    shown = (tmp_path / "run" / "report.html").read_text()
    assert "2 sessions" in shown
    last = [row for row in read_rows(run) if row["kind"] == "measured"][-1]
    assert (last["images"], last["metric"]) == (320, "pixels1200_shards")
    assert last["pixels1200_shards"] > 0 and last["discrepancy_1"] > 0
    assert last["best"] == read_best(run) and read_best(run)[0] in shown
    assert "checkpoint measured: pixels1200_shards" in again.stdout
    assert list((tmp_path / "run" / "tensorboard").glob("*.measured"))
    finished = train(job_file, *changes)
    assert finished.returncode == 0 and "report.html" in finished.stdout


# The default run trains on S3 in promises/test_bad_nights.py.
@pytest.mark.long
def test_the_same_job_runs_on_s3_by_changing_uris(job_file: Path, s3_server) -> None:
    base = f"s3://{s3_server.bucket}/job"
    result = train(
        job_file,
        f"run.folder={base}/run",
        f"data.shards={base}/shards",
        f"storage.endpoint_url={s3_server.endpoint_url}",
        "checkpoints.keep=1",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    run = locate(f"{base}/run", s3_server.endpoint_url)
    checkpoint = newest(run)
    assert checkpoint is not None and read_state(checkpoint).images == 64
    assert [folder.name for folder in (run / "checkpoints").folders()] == [checkpoint.name]
    assert (run / "report.html").exists()
    assert [row["images"] for row in read_rows(run) if row["kind"] == "train"] == [32, 64]
    assert (run / "tensorboard").sizes()


def damage(shards: Path, samples: int) -> None:
    """Overwrites the pixels of the first shard's first samples, sizes as they were."""
    path = shards / "train-000000.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(content))) as archive:
        images = [info for info in archive if info.name.endswith(".png")]
    for info in images[:samples]:
        content[info.offset_data : info.offset_data + info.size] = bytes(info.size)
    path.write_bytes(bytes(content))


def test_more_broken_samples_than_allowed_end_the_run(job_file: Path, tmp_path: Path) -> None:
    damage(tmp_path / "shards", 400)
    result = train(
        job_file,
        "run.total_images=1280",
        "data.max_broken_samples=5",
        "workers.max_failures=100",
    )
    assert result.returncode == 2, result.stderr[-3000:]
    assert "broken samples are more than data.max_broken_samples 5" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("change", "exit_code", "message"),
    [
        (
            "optimisation.lanse=3",
            2,
            "unknown key optimisation.lanse, did you mean optimisation.lanes?",
        ),
        ("data.num_classes=9", 2, "class id 9, outside data.num_classes 9"),
        ("model.resolution=64", 2, "the shards hold 1 x 32 x 32 images"),
        ("model.generator.patch=8", 2, "model.generator.patch is 4 there, 8 here"),
        # Storage that doesn't answer may do so later.
        ("storage.endpoint_url=http://127.0.0.1:9", 75, "storage failed at s3://nowhere/shards"),
    ],
)
def test_what_is_found_before_the_work_is_one_message_and_its_exit_code(
    change: str,
    exit_code: int,
    message: str,
    job_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from typer.testing import CliRunner

    from cat_ray import config as configuration
    from cat_ray.cli import app
    from cat_ray.data.index import read_index
    from cat_ray.operations.identity import claim

    shards = locate(f"{tmp_path}/shards")
    digest = read_index(shards).digest()
    claim(locate(f"{tmp_path}/run"), configuration.load(str(job_file)), digest)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    arguments = ["train", str(job_file), "--set", change]
    if "endpoint" in change:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        arguments += ["--set", "data.shards=s3://nowhere/shards"]
        arguments += ["--set", "storage.retry_seconds=0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_run_has_its_configuration_and_is_not_begun_anew_when_all_its_checkpoints_are_damaged(
    job_file: Path, tmp_path: Path
) -> None:
    result = train(job_file)
    assert result.returncode == 0, result.stderr[-3000:]
    resolved = yaml.safe_load((tmp_path / "run" / "config.resolved.yaml").read_text())
    assert resolved["optimisation"]["betas"] == [0.0, 0.99]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    names = {"discrepancy_1", "rewrite_3", "direction_2", "data_wait_share", "images_per_second"}
    assert names <= next(row for row in rows if row["kind"] == "train").keys()
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in checkpoints.glob("*/generator.00-of-02.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    before = sorted(folder.name for folder in checkpoints.iterdir())
    again = train(job_file, "run.total_images=128")
    assert again.returncode == 2
    assert f"every checkpoint in {tmp_path}/run is damaged" in again.stderr
    assert sorted(folder.name for folder in checkpoints.iterdir()) == before


@pytest.mark.parametrize(
    ("fault", "message"), [("truncate", "truncated or replaced"), ("remove", "is missing")]
)
def test_a_damaged_data_set_is_found_before_training(
    fault: str, message: str, job_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "shards" / "train-000003.tar"
    if fault == "truncate":
        path.write_bytes(path.read_bytes()[:-1024])
    else:
        path.unlink()
    result = train(job_file)
    assert result.returncode == 2
    assert "train-000003.tar" in result.stderr and message in result.stderr
    assert not (tmp_path / "run").exists()
