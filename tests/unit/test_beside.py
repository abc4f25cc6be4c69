"""Which checkpoint is measured next while a run is trained, and by which job."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cat_ray.checkpoint.layout import GENERATOR, State
from cat_ray.config import Config, parse
from cat_ray.errors import BadInput
from cat_ray.evaluation.beside import (
    Measuring,
    check,
    measurement,
    next_due,
    results,
    worker_seconds,
)
from cat_ray.evaluation.measurement import Workers
from cat_ray.evaluation.result import Result
from cat_ray.operations.journal import METRICS, read_rows
from cat_ray.operations.progress import describe
from cat_ray.operations.report import write_report
from cat_ray.storage import Location, locate

FID = "evaluation.fid={every_images: 32, features: {network: pixels}, keep_best: 2}"


@pytest.fixture
def config(tiny_job: str) -> Config:
    return parse(tiny_job, "job.yaml", [FID])


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("saved", "measured", "expected"),
    [
        ([], [], None),
        ([90], [], None),
        ([90, 105], [], 105),
        # The first of its interval, not the newest.
        ([105, 110, 190], [], 105),
        ([110, 190], [], 110),
        ([105, 110, 190], [105], None),
        # What was overtaken is left out.
        ([105, 210, 250], [], 210),
        ([210, 310], [210], 310),
        # The last one is due wherever it stands.
        ([305, 350], [305], 350),
        ([305, 350], [305, 350], None),
    ],
)
def test_the_first_checkpoint_of_the_newest_interval_is_due(saved, measured, expected):
    assert next_due(saved, measured, 100, 350) == expected


@given(st.sets(st.integers(1, 400), min_size=1), st.integers(1, 100))
def test_measuring_at_once_measures_the_first_past_each_multiple_and_the_last(saved, every):
    total, there, measured = max(saved), [], []
    for images in sorted(saved):
        there.append(images)
        while (chosen := next_due(there, measured, every, total)) is not None:
            measured.append(chosen)
    firsts = [min(i for i in saved if i // every == k) for k in {i // every for i in saved} - {0}]
    assert sorted(measured) == sorted({*firsts, total})


def test_the_job_takes_from_the_run_what_it_does_not_say(config, run):
    assert config.evaluation.fid is not None
    job = measurement(config, config.evaluation.fid, run, "the-checkpoint")
    assert (job.samples.checkpoint, job.samples.count) == ("the-checkpoint", 50_000)
    assert (job.reference, job.output.folder) == (config.data.shards, f"{run.uri}/fid")
    assert job.workers.spare, "it must not take what the training needs"


def test_what_can_never_be_measured_is_refused(tiny_job):
    with pytest.raises(BadInput, match=r"every_images 16 is less than checkpoints\.save_every_im"):
        parse(tiny_job, "job.yaml", [FID.replace("32", "16")])


def test_what_cannot_be_measured_is_told_before_the_training(config, run, tmp_path, tiny_job):
    with pytest.raises(BadInput, match=r"evaluation\.fid: .*shards"):
        check(config, run)
    features = f"{{network: inception, weights: {tmp_path}/absent, sha256: abc}}"
    asked = parse(tiny_job, "job.yaml", [FID.replace("{network: pixels}", features)])
    with pytest.raises(BadInput, match=r"evaluation\.fid: can't read the weights .*absent"):
        check(asked, run)


def result(run: Location, images: int, distance: float, samples: int = 5) -> Result:
    """Of a checkpoint that is made as well."""
    checkpoint = run / "checkpoints" / f"images-{images:012d}-3f9a1c"
    (checkpoint / "manifest.json").write(b"{}")
    found = Result(
        metric="pixels5_shards",
        figures={"frechet": distance, "recall": 0.5},
        protocol={"samples": samples},
        subject={"checkpoint": checkpoint.uri, "images": images},
        pixels_sha256="",
        made_with={},
        images_per_second={},
        seconds={},
    )
    (run / "fid" / f"{checkpoint.name}.json").write(json.dumps(asdict(found)).encode())
    return found


def test_the_best_are_of_one_protocol_and_still_there(config, run):
    assert list(results(run)) == []
    for images, distance in ((32, 1.0), (64, 3.0), (96, 2.0), (128, 0.5)):
        newest = result(run, images, distance)
    result(run, 160, 0.1, samples=6)
    (run / "checkpoints" / "images-000000000032-3f9a1c").delete_folder()
    found = Measuring(config, run, "a")._best(newest)
    assert found == [f"images-{images:012d}-3f9a1c" for images in (128, 96)]


def test_a_folder_that_is_no_checkpoint_is_not_measured(config, run, save_checkpoint):
    for name in ("backup", "lost+found", ".ipynb_checkpoints", "eval-500", "images-500-mybackup"):
        (run / "checkpoints" / name / "manifest.json").write(b"{}")
    assert Measuring(config, run, "a")._due() is None
    saved = save_checkpoint(run, State(32, 0, "", "", {}), {GENERATOR: {"a": torch.zeros(1)}})
    assert Measuring(config, run, "a")._due() == saved


@pytest.mark.parametrize(("spare", "seconds"), [(True, 0.0), (False, 36.0)])
def test_only_what_was_taken_from_the_cluster_is_counted(run, spare, seconds):
    found = replace(result(run, 64, 2.5), seconds={"start": 2.0, "samples": 9.0, "figures": 1.0})
    assert worker_seconds(found, Workers(count=3, spare=spare)) == seconds


def test_a_measurement_is_written_down_by_its_name_and_shown(config, run):
    (run / METRICS).write(b"")
    found = result(run, 64, 2.5)
    checkpoint = run / "checkpoints" / "images-000000000064-3f9a1c"
    Measuring(config, run, "a")._write(checkpoint, found, [checkpoint.name])
    (row,) = read_rows(run)
    assert (row["kind"], row["session"], row["images"]) == ("measured", "a", 64)
    assert row["worker_seconds"] == 0, "nothing is paid for what was left over"
    assert (row["pixels5_shards"], row["recall"]) == (2.5, 0.5) and "frechet" not in row
    assert describe(row, 640) == (
        "       64 images  checkpoint measured: pixels5_shards 2.5  recall 0.500  the best so far"
    )
    page = write_report(run).read().decode()
    assert "<td>pixels5_shards 2.5</td><td>recall 0.5</td>" in page and "the best" in page
