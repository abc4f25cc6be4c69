"""A run's metrics: what its rows and its ledger tell, and what Ray is told of it."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cat_ray.errors import StorageDown
from cat_ray.operations import prometheus
from cat_ray.operations.goodput import BINS, LEDGER
from cat_ray.operations.goodput import Row as LedgerRow
from cat_ray.operations.journal import Row
from cat_ray.operations.prometheus import METRICS, Exported, Point, points_of_ledger, points_of_rows
from cat_ray.storage import Location, locate


def row(kind: str, images: int, session: str = "a", **values: Any) -> Row:
    return {"kind": kind, "session": session, "images": images, **values}


def trained(images: int, images_per_second: float, session: str = "a") -> Row:
    speed = {"images_per_second": images_per_second, "data_wait_share": 0.25}
    return row("train", images, session, **speed)


def worker(group: str, rank: int, began: float, *noted: tuple[float, int]) -> list[LedgerRow]:
    """A worker of two that trains without a pause, and what it wrote down: when, and images."""
    nothing = dict.fromkeys(BINS, 0.0)
    return [
        LedgerRow(group, rank, 2, began, at, images, {**nothing, "train": at - began}, session="a")
        for at, images in noted
    ]


# 100 images, of which the last 40 are done again: the second group goes on from 60.
LEDGER_ROWS = [
    row
    for rank in (0, 1)
    for row in (
        *worker("first", rank, 0.0, (0.0, 0), (50.0, 60), (100.0, 100)),
        *worker("second", rank, 100.0, (100.0, 60), (200.0, 140)),
    )
]


def values(points: Iterator[Point]) -> dict[str, float]:
    return {point.name.removeprefix("cat_ray_"): point.value for point in points}


def test_every_metric_is_named_once_with_its_kind_in_its_name() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names) == 11
    for metric in METRICS:
        assert metric.name.startswith("cat_ray_") and metric.tags[0] == "run"
        assert (metric.kind == "counter") == metric.name.endswith("_total")


def test_speed_is_that_of_the_sessions_newest_line() -> None:
    rows = [trained(64, 20.0), trained(128, 40.0), trained(192, 80.0, session="before")]
    assert values(points_of_rows(rows, "a", batch_size=16)) == {
        "images_per_second": 40.0,
        "step_seconds": 0.4,
        "data_wait_seconds": 0.1,
    }
    assert values(points_of_rows(rows, "later", 16)) == {}


def test_the_stall_is_that_of_the_last_save() -> None:
    rows = [row("checkpoint", at, stall_seconds=at / 64) for at in (32, 64)]
    assert values(points_of_rows(rows, "a", 16)) == {"save_stall_seconds": 1.0}


def test_an_fid_has_its_protocol_and_what_is_none_is_not_called_one() -> None:
    rows = [
        row("measured", 32, "before", metric="fid5k_adm", fid5k_adm=9.0),
        row("measured", 64, "before", metric="fid5k_adm", fid5k_adm=5.0),
        row("measured", 64, metric="fid50k_adm", fid50k_adm=2.0),
        row("measured", 64, metric="pixels50k_shards", pixels50k_shards=1.0),
        row("measured", 64, metric="fd_dinov2_50k_shards", fd_dinov2_50k_shards=1.0),
    ]
    assert list(points_of_rows(rows, "a", 16)) == [
        Point("cat_ray_fid", 5.0, {"protocol": "fid5k_adm"}),
        Point("cat_ray_fid", 2.0, {"protocol": "fid50k_adm"}),
    ]


def test_the_ledger_tells_of_all_groups_and_what_was_done_again() -> None:
    found = values(points_of_ledger(LEDGER_ROWS, price_per_hour=3.6))
    # Of 400 worker-seconds the two workers' last 50 of the first group were lost.
    assert found == {
        "images_total": 100 + 80,
        "lost_images_total": 40,
        "restarts_total": 1,
        "world_size": 2,
        "goodput_ratio": pytest.approx(0.75),
        "cost_dollars_total": pytest.approx(0.4),
    }
    beside = values(points_of_ledger(LEDGER_ROWS, 3.6, beside_seconds=100.0))
    assert beside["cost_dollars_total"] == pytest.approx(0.5)
    assert "cost_dollars_total" not in values(points_of_ledger(LEDGER_ROWS, None))
    assert values(points_of_ledger([], 3.6)) == {}


def test_of_two_groups_that_lost_the_same_images_both_count() -> None:
    again = worker("third", 0, 200.0, (200.0, 60), (250.0, 100))
    found = values(points_of_ledger([*LEDGER_ROWS, *again], None))
    assert (found["lost_images_total"], found["restarts_total"]) == (40 + 80, 2)


# What Ray is told.


class Told:
    """Stands in for Ray's metrics: what each was set to, or grew by."""

    calls: list[tuple[str, float, dict[str, str]]]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
        assert description
        self.name, self.tag_keys = name, tag_keys

    def _record(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys
        Told.calls.append((self.name.removeprefix("cat_ray_"), value, tags))


class ToldGauge(Told):
    def set(self, value: float, tags: dict[str, str]) -> None:
        self._record(value, tags)


class ToldCounter(Told):
    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray refuses it"
        self._record(value, tags)


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


@pytest.fixture
def exported(run: Location, monkeypatch: pytest.MonkeyPatch) -> Exported:
    Told.calls = []
    monkeypatch.setattr(prometheus, "Gauge", ToldGauge)
    monkeypatch.setattr(prometheus, "Counter", ToldCounter)
    monkeypatch.setattr(prometheus, "PUSH_SECONDS", 0.0)
    monkeypatch.setattr(prometheus, "LEDGER_SHARE", float("inf"))
    return Exported(run, "a", 16, None)


def write(run: Location, rows: list[LedgerRow]) -> None:
    content = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    (run / LEDGER / "rows.jsonl").write(content.encode())


def told(name: str) -> list[float]:
    return [value for known, value, _ in Told.calls if known == name]


def test_counters_grow_by_what_came_and_gauges_are_set_every_time(exported, run) -> None:
    for known in (LEDGER_ROWS[:3], LEDGER_ROWS, LEDGER_ROWS):
        write(run, known)
        exported.update([trained(64, 20.0)])
    assert told("images_total") == [100, 80]
    assert told("lost_images_total") == [40]
    assert told("restarts_total") == [1]
    # Ray forgets those that aren't set again.
    assert told("images_per_second") == [20.0, 20.0, 20.0]
    assert told("world_size") == [2, 2, 2]
    assert all(tags["run"] == run.uri for _, _, tags in Told.calls)


def test_a_ledger_that_can_not_be_read_ends_nothing(exported, run, monkeypatch) -> None:
    def refuses(run: Location) -> list[LedgerRow]:
        raise StorageDown("the storage doesn't answer")

    write(run, LEDGER_ROWS)
    exported.update([])
    monkeypatch.setattr(prometheus, "read_ledger", refuses)
    exported.update([trained(64, 20.0)])
    assert told("world_size") == [2, 2], "what was known stays"
    assert told("images_per_second") == [20.0]


def test_looking_often_costs_nothing_but_the_end_is_told(exported, monkeypatch) -> None:
    monkeypatch.setattr(prometheus, "PUSH_SECONDS", 3600.0)
    for _ in range(3):
        exported.update([trained(64, 20.0)])
    assert told("images_per_second") == [20.0]
    exported.update([trained(64, 40.0)], last=True)
    assert told("images_per_second") == [20.0, 40.0]


def test_what_goes_wrong_ends_the_metrics_alone(exported, caplog) -> None:
    broken = {"kind": "train", "session": "a", "images": 16}
    for _ in range(2):
        exported.update([broken])
    exported.update([trained(64, 20.0)], last=True)
    assert Told.calls == []
    assert caplog.text.count("no more metrics") == 1 and "KeyError" in caplog.text
