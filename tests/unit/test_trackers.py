"""Trackers: what they are told, under which run, and what happens without them."""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from cat_ray.config import parse
from cat_ray.errors import BadInput
from cat_ray.operations.identity import differences
from cat_ray.operations.journal import METRICS, Journal
from cat_ray.operations.trackers import start_trackers
from cat_ray.storage import Location, locate

NAMES = ("wandb", "mlflow")


class Recorded:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, kind: str, images: int, values: dict[str, float]) -> None:
        self.calls.append((kind, images, values))

    def close(self) -> None:
        self.calls.append("closed")


@dataclass
class Service:
    """A tracking service: what was started under which id and name, sent and ended."""

    starts: list[tuple[str, str | None]] = field(default_factory=list)
    points: list[tuple[str, int, dict[str, float]]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    refuses: bool = False
    current: str = ""

    class Refusal(Exception):
        pass

    def begin(self, known: str | None, name: str | None) -> str:
        if self.refuses:
            raise self.Refusal("no such project")
        self.current = known or f"run-{len(self.starts)}"
        self.starts.append((self.current, name))
        return self.current

    def take(self, values: dict[str, float], step: int, run_id: str) -> None:
        if self.refuses:
            raise self.Refusal("gone away")
        self.points.append((run_id, step, values))

    def end(self) -> None:
        if self.refuses:
            raise self.Refusal("gone away")
        self.ended.append(self.current)


def stand_in_wandb(service: Service) -> Any:
    def init(id: str | None, resume: str, name: str | None) -> Any:
        assert resume == "allow"
        run_id = service.begin(id, name)
        log = partial(service.take, run_id=run_id)
        return SimpleNamespace(id=run_id, log=log, finish=service.end)

    return SimpleNamespace(init=init, Error=Service.Refusal)


def stand_in_mlflow(service: Service) -> Any:
    def start_run(run_id: str | None, run_name: str | None) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=service.begin(run_id, run_name)))

    return SimpleNamespace(
        start_run=start_run,
        log_metrics=service.take,
        end_run=service.end,
        get_tracking_uri=lambda: "http://tracking",
        MlflowException=Service.Refusal,
    )


STAND_INS: dict[str, Callable[[Service], Any]] = {
    "wandb": stand_in_wandb,
    "mlflow": stand_in_mlflow,
}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def service(name, monkeypatch) -> Service:
    """What stands in for the tracker's package in this test."""
    service = Service()
    monkeypatch.setitem(sys.modules, name, STAND_INS[name](service))
    monkeypatch.delenv("WANDB_NAME", raising=False)
    return service


@pytest.fixture
def run(tmp_path) -> Location:
    return locate(str(tmp_path / "digits"))


def test_the_journal_tells_every_tracker_its_numbers_and_only_these(run):
    trackers = (Recorded(), Recorded())
    journal = Journal(run, "a", 0, trackers)
    journal.append("train", 32, d_loss=0.5, workers=2)
    journal.append("checkpoint", 64, location="s3://bucket/run", seconds=1.5)
    assert trackers[0].calls == [
        ("train", 32, {"d_loss": 0.5, "workers": 2}),
        ("checkpoint", 64, {"seconds": 1.5}),
    ]
    journal.close()
    assert trackers[0].calls[2:] == ["closed"]
    assert trackers[1].calls == trackers[0].calls


def test_rows_are_written_before_a_tracker_can_fail(run, tmp_path):
    class Failing(Recorded):
        def log(self, kind: str, images: int, values: dict[str, float]) -> None:
            raise RuntimeError

    journal = Journal(run, "a", 0, (Failing(),))
    with pytest.raises(RuntimeError):
        journal.append("train", 32, d_loss=0.5)
    assert json.loads((tmp_path / "digits" / METRICS).read_text())["d_loss"] == 0.5


def test_values_arrive_as_kind_and_name_with_the_images_as_step(name, service, run):
    (tracker,) = start_trackers((name,), run)
    tracker.log("train", 4096, {"d_loss": 0.5, "g_loss": 0.25})
    values = {"train/d_loss": 0.5, "train/g_loss": 0.25}
    assert service.points == [(service.current, 4096, values)]
    assert not service.ended
    tracker.close()
    assert service.ended == [service.current]


def test_a_run_that_goes_on_keeps_its_tracker_run(name, service, run):
    for images in (32, 64):
        (tracker,) = start_trackers((name,), run)
        tracker.log("train", images, {"d_loss": 0.5})
        tracker.close()
    # Without a name the second time: it may have been changed on the service's own pages.
    assert service.starts == [("run-0", "digits"), ("run-0", None)]
    assert [point[:2] for point in service.points] == [("run-0", 32), ("run-0", 64)]


def test_each_run_folder_has_a_tracker_run_of_its_own(name, service, run, tmp_path):
    start_trackers((name,), run)
    start_trackers((name,), locate(str(tmp_path / "other")))
    assert service.starts == [("run-0", "digits"), ("run-1", "other")]


def test_a_name_in_the_environment_goes_before_the_folders(monkeypatch, run):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", stand_in_wandb(service))
    monkeypatch.setenv("WANDB_NAME", "mine")
    start_trackers(("wandb",), run)
    assert service.starts == [("run-0", "mine")]


def test_a_tracker_named_twice_starts_once(name, service, run):
    assert len(start_trackers((name, name), run)) == 1


def test_without_its_package_a_tracker_is_bad_input_that_names_the_extra(name, run, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match=rf"pip install '\.\[{name}\]'"):
        start_trackers((name,), run)


def test_the_folder_that_wandb_writes_to_is_not_taken_for_its_package(run, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BadInput, match=r"pip install '\.\[wandb\]'"):
        start_trackers(("wandb",), run)
    sys.modules.pop("wandb", None)


def test_a_service_that_refuses_to_start_is_bad_input_and_leaves_no_id(name, service, run):
    service.refuses = True
    with pytest.raises(BadInput, match=r"doesn't start.*no such project"):
        start_trackers((name,), run)
    assert not (run / f"{name}.run_id").exists()


def test_mlflow_that_fails_later_costs_points_but_not_the_run(monkeypatch, run, caplog):
    service = Service()
    monkeypatch.setitem(sys.modules, "mlflow", stand_in_mlflow(service))
    (tracker,) = start_trackers(("mlflow",), run)
    service.refuses = True
    with caplog.at_level(logging.WARNING):
        tracker.log("train", 32, {"d_loss": 0.5})
    assert "32 images: gone away" in caplog.text
    service.refuses = False
    tracker.log("train", 64, {"d_loss": 0.25})
    assert [step for _, step, _ in service.points] == [64]
    service.refuses = True
    with caplog.at_level(logging.WARNING):
        tracker.close()
    assert "end of the run: gone away" in caplog.text


def test_no_trackers_need_no_packages(run, monkeypatch):
    for package in NAMES:
        monkeypatch.setitem(sys.modules, package, None)
    assert start_trackers((), run) == ()


def test_trackers_are_chosen_by_the_job_and_may_change_while_a_run_goes_on(tiny_job):
    before = parse(tiny_job, "job.yaml")
    after = parse(tiny_job, "job.yaml", ["reporting.trackers=[wandb, mlflow]"])
    assert before.reporting.trackers == ()
    assert after.reporting.trackers == NAMES
    assert differences(before, after) == []
    with pytest.raises(BadInput, match=r"reporting\.trackers.*'wandb' or 'mlflow'"):
        parse(tiny_job, "job.yaml", ["reporting.trackers=[comet]"])
