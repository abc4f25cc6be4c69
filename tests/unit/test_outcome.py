"""How a call that trains ends: in `outcome.json` as in its exit code."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from typer.testing import CliRunner

from cat_ray.checkpoint.layout import GENERATOR, State
from cat_ray.cli import app
from cat_ray.config import dump, parse
from cat_ray.data.index import Index
from cat_ray.errors import (
    BadInput,
    GaveWay,
    RunFailed,
    StorageDown,
    StorageFull,
    Unfinished,
)
from cat_ray.operations.outcome import EXIT_CODES, OUTCOME, End, write_outcome
from cat_ray.storage import Location, locate
from cat_ray.training import driver

ENDS = {"failed": RunFailed, "bad input": BadInput, "unfinished": Unfinished}


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


def outcome(run: Location) -> dict:
    return json.loads((run / OUTCOME).read())


# The file.


def test_every_end_has_the_exit_code_of_its_exception():
    assert EXIT_CODES.keys() == set(get_args(End)) == {"finished", *ENDS}
    assert EXIT_CODES["finished"] == 0
    assert {end: error.exit_code for end, error in ENDS.items()} == {
        end: EXIT_CODES[end] for end in ENDS
    }
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)


@pytest.mark.parametrize("end", get_args(End))
def test_the_file_has_what_a_script_asks_for(run, end):
    write_outcome(run, end, 1600, "why")
    found = outcome(run)
    assert isinstance(found.pop("time"), float)
    assert found == {
        "outcome": end,
        "images": 1600,
        "message": "why",
        "exit_code": EXIT_CODES[end],
    }


def test_the_last_call_counts(run):
    write_outcome(run, "unfinished", 1600, "stopped")
    write_outcome(run, "finished", 3200)
    found = outcome(run)
    assert (found["outcome"], found["images"], found["message"]) == ("finished", 3200, "")


# The command.

Train = Callable[[Callable[[], object]], tuple[int, str]]


@pytest.fixture
def train(job_file: Path, monkeypatch) -> Train:
    """`cat-ray train` of a job with no data, in which this is called where training would be."""
    index = Index("images", 32, 1, (), "", (), "")
    monkeypatch.setattr(driver, "_checked_index", lambda config, shards: index)
    monkeypatch.setattr(driver, "cluster", lambda config: contextlib.nullcontext())

    def call(fit: Callable[[], object]) -> tuple[int, str]:
        monkeypatch.setattr(driver, "_fit", lambda *_: fit())
        result = CliRunner().invoke(app, ["train", str(job_file)])
        return result.exit_code, result.stderr

    return call


@pytest.fixture
def save(run, tiny_job, save_checkpoint) -> Callable[[int], Location]:
    """Saves a checkpoint of the run after so many images."""

    def make(images: int) -> Location:
        state = State(images, 0, "digest", dump(parse(tiny_job, "job.yaml")), {})
        return save_checkpoint(run, state, {GENERATOR: {"weight": torch.ones(1)}})

    return make


@pytest.mark.parametrize("end", ENDS)
def test_the_file_says_what_the_command_said(run, train, save, end):
    def fit() -> None:
        save(32)
        raise ENDS[end](f"told because {end}")

    code, told = train(fit)
    found = outcome(run)
    assert (found["outcome"], found["exit_code"], found["images"]) == (end, code, 32)
    assert told == f"cat-ray: {found['message']}\n" == f"cat-ray: told because {end}\n"


def test_a_run_that_reached_its_end_is_finished(run, train, save):
    assert train(lambda: save(64)) == (0, "")
    found = outcome(run)
    assert (found["outcome"], found["exit_code"], found["images"]) == ("finished", 0, 64)
    assert found["message"] == ""


def test_before_the_first_checkpoint_no_image_counts(run, train):
    def fit() -> None:
        raise Unfinished("stopped")

    assert train(fit)[0] == 75
    assert outcome(run)["images"] == 0


def test_a_finished_run_is_finished_again_without_training(run, train, save):
    train(lambda: save(64))
    (run / OUTCOME).delete()
    assert train(lambda: pytest.fail("trains")) == (0, "")
    assert outcome(run)["outcome"] == "finished"


def test_a_run_that_was_rolled_back_too_often_has_failed(run, train):
    roll_back = {"images": 32, "to_images": 0, "reason": "figures that are not finite: r1 nan"}
    train(lambda: None)
    (run / "rollbacks.json").write(json.dumps([roll_back] * 4).encode())
    code, told = train(lambda: pytest.fail("trains"))
    assert code == 1
    assert "rolled back 4 times, health.max_rollbacks is 3; the last time at 32 images" in told
    assert outcome(run)["message"] in told


def test_who_asked_an_earlier_call_to_stop_does_not_stop_the_next(run, train):
    train(lambda: None)
    (run / "stop").write(b"")
    seen = []
    train(lambda: seen.append((run / "stop").exists()))
    assert seen == [False]


def test_a_folder_of_another_run_keeps_its_outcome(run, train, job_file):
    train(lambda: None)
    before = (run / OUTCOME).read()
    job_file.write_text(job_file.read_text().replace("total_images", "seed: 3, total_images"))
    code, told = train(lambda: pytest.fail("trains"))
    assert code == 2 and "run.seed is 0 there, 3 here" in told
    assert (run / OUTCOME).read() == before


# What Ray Train ended with.


def in_group(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("[Rank 0 Error Snippet]:\ntold by Ray\n", dict(enumerate(errors)))


@pytest.mark.parametrize(
    ("error", "end", "told"),
    [
        (
            in_group(GaveWay("stop", "asked to stop: saving")),
            Unfinished,
            "(asked to stop: saving); run the same command again to go on",
        ),
        (ControllerError(Unfinished("too few nodes")), Unfinished, "too few nodes"),
        (in_group(RuntimeError("peer"), BadInput("no such shard")), BadInput, "no such shard"),
        (ControllerError(RunFailed("rolled back")), RunFailed, "rolled back"),
        (in_group(StorageDown("s3://b/k: no answer")), StorageDown, "s3://b/k: no answer"),
        (ControllerError(StorageFull("no space left")), StorageFull, "no space left"),
        (in_group(RuntimeError("peer")), RunFailed, "training failed: RuntimeError: peer"),
        (
            ControllerError(RuntimeError("no such actor")),
            RunFailed,
            "failed: RuntimeError: no such actor",
        ),
    ],
)
def test_an_end_of_ray_train_is_one_of_ours_in_one_line(
    run, tiny_job, monkeypatch, error, end, told
):
    def fit() -> None:
        raise error

    monkeypatch.setattr(driver, "ElasticTrainer", lambda *_, **__: SimpleNamespace(fit=fit))
    monkeypatch.setattr(driver.elasticity, "environment", lambda *_: {})
    monkeypatch.setattr(driver, "keep_helpers_here", lambda: None)
    with pytest.raises(end) as caught:
        driver._fit(parse(tiny_job, "job.yaml"), run, "a", lambda: pytest.fail("starts"), ())
    assert str(caught.value).endswith(told)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
