"""The account of a run in time and money: what spot saved, and what failures took from it."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from cat_ray.operations.cost import (
    NO_PRICES,
    Summary,
    beside_seconds_of,
    bill,
    cost_table,
    saving,
    summarise,
    to_json,
)
from cat_ray.operations.goodput import ALL_BINS, BINS, Row

# Ten worker-hours.
HOURS = {
    "train": 6.0,
    "data_wait": 1.0,
    "save_stall": 1.0,
    "start": 0.5,
    "evaluation": 0.25,
    "lost": 0.75,
    "idle": 0.5,
}
SUMMARY = Summary({name: hours * 3600 for name, hours in HOURS.items()}, 2_000_000, (4, 2, 3))
NOTHING = Summary(dict.fromkeys(ALL_BINS, 0.0), 0, ())


def printed(spot: float | None, on_demand: float | None, summary: Summary = SUMMARY) -> list[str]:
    """Each line as an 80 column terminal shows it, with single spaces and without the frame."""
    text = io.StringIO()
    Console(file=text, width=80).print(cost_table(summary, spot, on_demand))
    return [" ".join(re.sub("[│┃]", " ", line).split()) for line in text.getvalue().splitlines()]


def after(label: str, lines: list[str]) -> str:
    """What stands behind a label, in its line."""
    (found,) = [line for line in lines if line.startswith(f"{label} ")]
    return found.removeprefix(f"{label} ")


def test_a_summary_adds_up_the_ledger():
    def row(group: str, rank: int, workers: int, began: float, images: int, train: float) -> Row:
        seconds = {**dict.fromkeys(BINS, 0.0), "train": train}
        return Row(group, rank, workers, began, began + train, images, seconds)

    rows = [
        *(row("a", rank, 2, 0.0, 0, 0.0) for rank in range(2)),
        *(row("a", rank, 2, 0.0, 64, 100.0) for rank in range(2)),
        row("b", 0, 1, 160.0, 32, 0.0),
        row("b", 0, 1, 160.0, 96, 40.0),
    ]
    summary = summarise(rows)
    assert (summary.images, summary.workers) == (96, (2, 1))
    assert summary.seconds == {
        **dict.fromkeys(ALL_BINS, 0.0),
        "train": 140.0,
        "lost": 100.0,
        "idle": 60.0,
    }
    assert (summary.total, summary.goodput, summary.share("lost", "idle")) == (
        300,
        140 / 300,
        160 / 300,
    )
    assert summarise(rows, away_seconds=59).total == 240
    beside = summarise(rows, beside_seconds=30.0)
    assert (beside.seconds["evaluation"], beside.total) == (30, 330)


def test_a_bill_is_time_at_a_price_per_worker_and_hour():
    spot = bill(SUMMARY, 1.5)
    assert spot.bins == pytest.approx({name: hours * 1.5 for name, hours in HOURS.items()})
    assert (spot.total, spot.undisturbed, spot.per_million_images) == pytest.approx((15, 12, 7.5))


def test_the_saving_is_what_is_left_of_the_price_difference_after_recovery():
    found = saving(spot=bill(SUMMARY, 1.5), on_demand=bill(SUMMARY, 4.0))
    assert (found.on_demand, found.spot) == pytest.approx((32, 15))
    assert (found.possible, found.taken, found.saved) == pytest.approx((20, 3, 17))


def test_the_table_has_time_share_and_money_of_every_bin():
    lines = printed(1.5, 4.0)
    for label, cells in {
        "train": "21,600.0 60.0% $9.0000 $24.0000",
        "data wait": "3,600.0 10.0% $1.5000 $4.0000",
        "save stall": "3,600.0 10.0% $1.5000 $4.0000",
        "start and restore": "1,800.0 5.0% $0.7500 $2.0000",
        "evaluation": "900.0 2.5% $0.3750 $1.0000",
        "lost: done again": "2,700.0 7.5% $1.1250 $3.0000",
        "idle": "1,800.0 5.0% $0.7500 $2.0000",
        "total": "36,000.0 100.0% $15.0000 $40.0000",
        "without any loss": "28,800.0 80.0% $12.0000 $32.0000",
        "per million images": "$7.5000 $20.0000",
        "goodput": "60.0%",
    }.items():
        assert after(label, lines) == cells
    assert "2,000,000 images, 3 groups of 2 to 4 workers" in lines
    assert after("on demand without any loss", lines) == (
        "$32.0000, spot $15.0000: spot saved $17.0000"
    )
    assert after("start, evaluation, lost, idle took", lines) == (
        "$3.0000 of a possible saving of $20.0000"
    )


def test_a_dear_run_is_told_in_cents():
    assert after("total", printed(15.0, 40.0)) == "36,000.0 100.0% $150.00 $400.00"


def test_spot_that_was_dearer_in_the_end_is_told():
    told = after("on demand without any loss", printed(3.5, 4.0))
    assert told == "$32.0000, spot $35.0000: spot cost $3.0000 more"


def test_without_prices_there_is_time_and_the_keys_that_set_them():
    lines = printed(None, None)
    assert after("train", lines) == "21,600.0 60.0%"
    assert NO_PRICES in lines
    assert all(
        key in NO_PRICES for key in ("cost.spot_per_gpu_hour", "cost.on_demand_per_gpu_hour")
    )
    assert "bin worker-seconds share" in lines
    assert "$" not in "".join(lines)


@pytest.mark.parametrize(
    ("spot", "on_demand", "total"),
    [(1.5, None, "$15.0000"), (None, 4.0, "$40.0000"), (0.0, None, "$0.0000")],
)
def test_with_one_price_there_is_one_bill_and_nothing_to_compare(spot, on_demand, total):
    lines = printed(spot, on_demand)
    assert after("total", lines) == f"36,000.0 100.0% {total}"
    assert NO_PRICES not in lines
    assert not any("saving" in line or "saved" in line for line in lines)


@pytest.mark.parametrize("prices", [(None, None), (1.5, 4.0)])
def test_a_run_before_its_first_second_has_a_table_too(prices):
    lines = printed(*prices, summary=NOTHING)
    assert after("total", lines).startswith("0.0 0.0%")
    assert "no worker group yet" in lines
    assert not any(line.startswith("per million") for line in lines)


@pytest.mark.parametrize(
    ("workers", "title"), [((4,), "1 group of 4 workers"), ((2, 2), "2 groups of 2 workers")]
)
def test_the_title_tells_groups_and_workers(workers, title):
    summary = Summary(SUMMARY.seconds, 5000, workers)
    assert f"5,000 images, {title}" in printed(None, None, summary)


def test_a_program_gets_the_same_numbers():
    content = json.loads(to_json(SUMMARY, 1.5, 4.0))
    assert content["worker_seconds"]["total"] == 36_000
    assert content["worker_seconds"]["lost"] == 2700
    assert sum(content["shares"].values()) == pytest.approx(1)
    assert (content["goodput"], content["images"], content["workers"]) == (
        0.6,
        2_000_000,
        [4, 2, 3],
    )
    assert content["bills"]["spot"]["bins"]["lost"] == pytest.approx(1.125)
    assert content["bills"]["on_demand"]["per_million_images"] == pytest.approx(20)
    assert content["saving"]["saved"] == pytest.approx(17)


def test_a_program_learns_that_there_are_no_prices():
    content = json.loads(to_json(NOTHING, None, None))
    assert (content["bills"], content["saving"], content["goodput"]) == ({}, None, 0)


def test_what_a_measurement_took_counts_where_it_is_a_number():
    spent = [1.5, None, "3", math.nan, math.inf, 10**400, 2]
    rows = [{"kind": "measured", "worker_seconds": seconds} for seconds in spent]
    assert beside_seconds_of([*rows, {"kind": "train", "worker_seconds": 5}]) == 3.5
