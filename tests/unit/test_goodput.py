"""The goodput ledger: every worker-second in one bin, through kills, resizes and restarts."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from cat_ray.operations.goodput import (
    ALL_BINS,
    AWAY_SECONDS,
    BINS,
    LEDGER,
    UPLOAD_SECONDS,
    Ledger,
    Outcome,
    Row,
    account,
    groups_of,
    read_ledger,
    unix_time,
)
from cat_ray.storage import Location, locate

some = settings(max_examples=150, deadline=None, derandomize=True)
NOON = 1_800_000_000.0


class Clock:
    """Unix time as the test says."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


@pytest.fixture
def remote(tmp_path: Path) -> Location:
    """A run on a filesystem that isn't this machine's, as an object store is."""
    (tmp_path / "run" / LEDGER).mkdir(parents=True)
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    return Location(store, "run", "s3://bucket/run")


def spent(run: Location) -> dict[str, float]:
    """The bins of the last row, without the empty ones."""
    return {name: seconds for name, seconds in read_ledger(run)[-1].seconds.items() if seconds}


def row(
    at: float,
    images: int,
    seconds: dict,
    outcome: Outcome | None = None,
    *,
    group: str = "a",
    rank: int = 0,
    workers: int = 1,
    began: float = 0.0,
) -> Row:
    spent_in = {name: float(seconds.get(name, 0)) for name in BINS}
    return Row(group, rank, workers, began, at, images, spent_in, outcome)


def bins_of(rows: Sequence[Row], away_seconds: float = AWAY_SECONDS) -> dict[str, float]:
    """The account of some rows, without the empty bins."""
    seconds = account(groups_of(rows), away_seconds)
    return {name: value for name, value in seconds.items() if value}


# What a worker writes down.


def test_time_is_start_until_started_then_train_and_a_blocks_inside_one(run, clock):
    ledger = Ledger(run, "a", 0, 1, 0, clock=clock)
    clock.wait(1)
    ledger.started()
    clock.wait(2)
    with ledger.spending("data_wait"):
        clock.wait(4)
    clock.wait(8)
    ledger.note(16)
    assert spent(run) == {"start": 1, "train": 10, "data_wait": 4}


def test_time_of_a_block_inside_another_is_not_counted_twice(run, clock):
    ledger = Ledger(run, "a", 0, 1, 0, clock=clock)
    with ledger.spending("evaluation"):
        clock.wait(1)
        with ledger.spending("save_stall"):
            clock.wait(2)
            with ledger.spending("evaluation"):
                clock.wait(4)
            ledger.started()
            clock.wait(8)
        clock.wait(16)
    clock.wait(32)
    ledger.note(0)
    assert spent(run) == {"evaluation": 21, "save_stall": 10, "train": 32}


def test_a_block_that_fails_ends(run, clock):
    ledger = Ledger(run, "a", 0, 1, 0, clock=clock)
    ledger.started()
    with pytest.raises(KeyError), ledger.spending("save_stall"):
        clock.wait(1)
        raise KeyError
    clock.wait(2)
    ledger.close(0, "failed")
    assert spent(run) == {"save_stall": 1, "train": 2}
    assert read_ledger(run)[-1].outcome == "failed"


def test_start_up_counts_from_the_drivers_beginning(run, clock):
    Ledger(run, "a", 0, 1, 0, began=NOON - 30, clock=clock)
    (first,) = read_ledger(run)
    assert (first.began, first.at, first.seconds["start"]) == (NOON - 30, NOON, 30)


def test_a_driver_whose_clock_is_ahead_takes_no_time_away(run, clock):
    Ledger(run, "a", 0, 1, 0, began=NOON + 30, clock=clock)
    (first,) = read_ledger(run)
    assert (first.began, first.seconds["start"]) == (NOON, 0)


def test_a_group_is_known_from_its_first_moment_with_the_images_it_goes_on_from(run, clock):
    Ledger(run, "a", 3, 4, 512, clock=clock)
    (first,) = read_ledger(run)
    assert (first.group, first.rank, first.workers, first.images) == ("a", 3, 4, 512)
    assert first.outcome is None


def test_every_worker_and_group_has_a_file_of_its_own(run, tmp_path, clock):
    for group, rank in (("a", 0), ("a", 1), ("b", 0)):
        Ledger(run, group, rank, 2, 0, clock=clock).note(8)
    names = sorted(path.name for path in (tmp_path / "run" / LEDGER).iterdir())
    assert names == ["a-0000.jsonl", "a-0001.jsonl", "b-0000.jsonl"]
    assert len(read_ledger(run)) == 6


def test_a_run_without_a_ledger_has_no_rows(run):
    assert read_ledger(run) == []


def test_a_line_that_a_kill_cut_off_is_left_out_wherever_it_was_cut(run, tmp_path, clock):
    ledger = Ledger(run, "a", 0, 1, 0, clock=clock)
    ledger.note(8)
    whole = read_ledger(run)
    clock.wait(1)
    ledger.note(16)
    path = tmp_path / "run" / LEDGER / "a-0000.jsonl"
    content = path.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    for left in range(len(last)):
        path.write_bytes(content[: len(content) - len(last) + left])
        assert read_ledger(run) == whole


def test_on_an_object_store_the_whole_file_is_put_every_few_seconds_at_most(remote, clock):
    asked: list[float] = []

    def tell(act: Callable[[], None], key: object = None, every_seconds: float = 0.0) -> None:
        asked.append(every_seconds)
        act()

    ledger = Ledger(remote, "a", 0, 1, 0, clock=clock, tell=tell)
    for images in (8, 16, 24):
        clock.wait(1)
        ledger.note(images)
    ledger.close(24, "finished")
    rows = read_ledger(remote)
    assert [each.images for each in rows] == [0, 8, 16, 24, 24]
    assert [each.outcome for each in rows] == [None] * 4 + ["finished"]
    assert asked == [UPLOAD_SECONDS] * 5


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"group": "a"}', b"\xff", b'{"group": 3, "rank": 0}']
)
def test_a_damaged_line_is_left_out_and_named(run, clock, caplog, line):
    Ledger(run, "a", 0, 1, 0, clock=clock).note(8)
    whole = read_ledger(run)
    place = run / LEDGER / "a-0000.jsonl"
    place.write(line + b"\n" + place.read())
    assert read_ledger(run) == whole
    assert f"{place.uri}: line 1 is damaged" in caplog.text


def test_a_clock_that_is_set_back_takes_no_time_away(monkeypatch):
    before = unix_time()
    assert before == pytest.approx(time.time(), abs=60)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert unix_time() >= before


steps = st.lists(
    st.tuples(st.sampled_from(["note", "started", "open", "shut"]), st.floats(0, 1e5)), max_size=30
)


@some
@given(steps, st.floats(0, 1e5), st.data())
def test_a_workers_bins_add_up_to_its_time_in_every_row(moves, before, data):
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        run = locate(folder)
        ledger = Ledger(run, "a", 0, 1, 0, NOON - before, clock)
        blocks = []
        for move, seconds in moves:
            clock.wait(seconds)
            if move == "note":
                ledger.note(8)
            elif move == "started":
                ledger.started()
            elif move == "open":
                blocks.append(ledger.spending(data.draw(st.sampled_from(BINS))))
                blocks[-1].__enter__()
            elif blocks:
                blocks.pop().__exit__(None, None, None)
        ledger.close(8, "yielded")
        for each in read_ledger(run):
            assert sum(each.seconds.values()) == each.at - each.began
            assert min(each.seconds.values()) >= 0


# The account.


def test_without_failures_the_bins_are_what_the_workers_told():
    rows = [
        row(10, 0, {"start": 10}, workers=2),
        row(10, 0, {"start": 10}, workers=2, rank=1),
        row(100, 64, {"start": 10, "train": 80, "data_wait": 10}, "finished", workers=2),
        row(100, 64, {"start": 10, "train": 70, "save_stall": 20}, "finished", workers=2, rank=1),
    ]
    assert bins_of(rows) == {"start": 20, "train": 150, "data_wait": 10, "save_stall": 20}


KILLED = [
    row(10, 0, {"start": 10}),
    row(50, 100, {"start": 10, "train": 40}),
    row(90, 300, {"start": 10, "train": 70, "data_wait": 4, "evaluation": 6}),
]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (300, {"start": 11, "train": 70, "data_wait": 4, "evaluation": 6}),
        (200, {"start": 11, "train": 55, "data_wait": 2, "evaluation": 3, "lost": 20}),
        (100, {"start": 11, "train": 40, "lost": 40}),
        (25, {"start": 11, "train": 10, "lost": 70}),
        (0, {"start": 11, "lost": 80}),
    ],
)
def test_work_beyond_the_next_groups_images_is_lost(images, expected):
    rows = [*KILLED, row(91, images, {"start": 1}, group="b", began=90)]
    assert bins_of(rows) == pytest.approx(expected)


def test_a_save_noted_at_the_images_that_the_next_group_starts_from_is_kept():
    rows = [
        row(50, 100, {"train": 50}),
        row(60, 100, {"train": 50, "save_stall": 10}),
        row(90, 200, {"train": 80, "save_stall": 10}),
        row(90, 100, {}, group="b", began=90),
    ]
    assert bins_of(rows) == {"train": 50, "save_stall": 10, "lost": 30}


def test_a_group_that_goes_back_further_loses_the_work_of_all_before():
    rows = [
        row(0, 0, {}),
        row(100, 100, {"train": 100}, "yielded"),
        row(100, 100, {}, group="b", began=100),
        row(200, 200, {"train": 100}, "yielded", group="b", began=100),
        row(200, 50, {}, group="c", began=200),
    ]
    assert bins_of(rows) == {"train": 50, "lost": 150}


def test_a_killed_workers_time_after_its_last_row_is_lost():
    rows = [
        row(40, 10, {"train": 40}, workers=3),
        row(60, 10, {"train": 60}, workers=3, rank=1),
    ]
    # The third worker died before its first row.
    assert bins_of(rows) == {"train": 100, "lost": 20, "start": 60}


@pytest.mark.parametrize("outcome", ["finished", "yielded"])
def test_a_worker_that_ends_well_before_the_others_is_idle_until_they_do(outcome):
    rows = [
        row(40, 10, {"train": 40}, outcome, workers=2),
        row(60, 10, {"train": 60}, outcome, workers=2, rank=1),
    ]
    assert bins_of(rows) == {"train": 100, "idle": 20}


def test_what_led_to_a_failure_is_lost_even_if_no_image_is_seen_again():
    rows = [
        row(50, 100, {"start": 10, "train": 40}),
        row(90, 100, {"start": 12, "train": 78}, "failed"),
        row(90, 100, {}, group="b", began=90),
    ]
    assert bins_of(rows) == {"start": 12, "train": 40, "lost": 38}


def test_between_groups_the_later_ones_workers_are_idle():
    rows = [
        row(100, 10, {"train": 100}),
        *(row(130, 10, {}, group="b", began=130, workers=3, rank=rank) for rank in range(3)),
    ]
    assert bins_of(rows) == {"train": 100, "idle": 90}


@pytest.mark.parametrize(("session", "idle"), [("one", {"idle": 30}), ("another", {})])
def test_between_two_calls_of_the_command_nobody_was_paid(session, idle):
    rows = [
        replace(row(50, 16, {"train": 50}, "yielded", group="a"), session="one"),
        replace(row(130, 32, {"train": 50}, "finished", group="b", began=80), session=session),
    ]
    assert bins_of(rows) == {"train": 100, **idle}


@pytest.mark.parametrize(("away_seconds", "idle"), [(29.9, {}), (30.0, {"idle": 30})])
def test_a_gap_that_is_too_long_was_not_paid(away_seconds, idle):
    rows = [row(100, 10, {"train": 100}), row(130, 10, {}, group="b", began=130)]
    assert bins_of(rows, away_seconds) == {"train": 100, **idle}


@pytest.mark.parametrize(
    ("images", "outcome", "expected"),
    [
        (80, None, {"train": 40, "data_wait": 10}),
        (50, None, {"train": 40, "data_wait": 10}),
        (40, None, {"train": 32, "data_wait": 8, "lost": 10}),
        (0, "failed", {"lost": 50}),
    ],
)
def test_a_group_ends_where_the_next_begins_whatever_its_workers_still_write(
    images, outcome, expected
):
    rows = [
        row(0, 0, {}),
        row(100, 100, {"train": 80, "data_wait": 20}, outcome),
        row(50, images, {}, group="b", began=50),
    ]
    assert bins_of(rows) == pytest.approx(expected)


def test_a_worker_that_was_there_too_late_was_only_starting():
    rows = [
        row(0, 0, {}, workers=2),
        row(70, 0, {"train": 10}, workers=2, rank=1, began=60),
        row(50, 0, {}, group="b", began=50),
    ]
    assert bins_of(rows) == {"lost": 50, "start": 50}


def test_no_rows_no_time():
    assert account(groups_of([])) == dict.fromkeys(ALL_BINS, 0.0)


durations = st.floats(0, 5000)


@st.composite
def worker_rows(draw, group: str, rank: int, workers: int, images: int, began: float) -> list[Row]:
    """What one worker wrote: in any bins, perhaps from later on, perhaps nothing at all."""
    began += draw(st.just(0.0) | durations)
    seconds = dict.fromkeys(BINS, 0.0)
    at, rows = began, []
    # Of the first worker something is known always: else there is no such group.
    for _ in range(draw(st.integers(rank == 0, 5))):
        for name in draw(st.lists(st.sampled_from(BINS), max_size=3)):
            later = at + draw(durations)
            seconds[name] += later - at
            at = later
        rows.append(Row(group, rank, workers, began, at, images, dict(seconds)))
        images += draw(st.integers(0, 100))
    if rows and draw(st.booleans()):
        outcome = draw(st.sampled_from(["finished", "yielded", "failed"]))
        rows.append(Row(group, rank, workers, began, at, images, dict(seconds), outcome))
    return rows


@st.composite
def histories(draw) -> list[list[Row]]:
    """The rows of each group of a run that is killed and resized; groups may overlap."""
    groups: list[list[Row]] = []
    began, ended = NOON, NOON
    for number in range(draw(st.integers(0, 5))):
        workers, images = draw(st.integers(1, 4)), draw(st.integers(0, 300))
        if draw(st.booleans()):
            began = ended + draw(st.floats(1e-3, 2000))
        else:
            began += 1e-3 + draw(st.floats(0, 1)) * (ended - began)
        rows = [
            each
            for rank in range(workers)
            for each in draw(worker_rows(f"g{number}", rank, workers, images, began))
        ]
        groups.append(rows)
        began, ended = min(each.began for each in rows), max(each.at for each in rows)
    return groups


def paid(groups: Sequence[Sequence[Row]], away_seconds: float) -> float:
    """Worker-seconds that a run paid for, from its groups' begins and ends alone."""
    begins = [min(each.began for each in rows) for rows in groups] + [math.inf]
    ends = [
        min(max(each.at for each in rows), later)
        for rows, later in zip(groups, begins[1:], strict=True)
    ]
    inside = [
        (end - begin) * rows[0].workers
        for rows, begin, end in zip(groups, begins, ends, strict=False)
    ]
    between = [
        (begin - end) * rows[0].workers
        for (_, rows), begin, end in zip(pairwise(groups), begins[1:], ends, strict=False)
        if begin - end <= away_seconds
    ]
    return math.fsum(inside + between)


@some
@given(histories(), st.sampled_from([0.0, 100.0, 600.0, math.inf]))
def test_every_paid_second_lands_in_exactly_one_bin(groups, away_seconds):
    rows = [each for group in groups for each in group]
    seconds = account(groups_of(rows), away_seconds)
    assert min(seconds.values()) >= 0
    assert abs(math.fsum(seconds.values()) - paid(groups, away_seconds)) <= 1e-6


@some
@given(histories())
def test_work_is_lost_or_in_its_own_bin_and_never_more_than_was_told(groups):
    seconds = account(groups_of(each for group in groups for each in group))
    last = {(each.group, each.rank): each for group in groups for each in group}
    for name in set(BINS) - {"start"}:
        assert seconds[name] <= sum(each.seconds[name] for each in last.values()) + 1e-6


@some
@given(histories(), st.randoms(use_true_random=False))
def test_the_order_in_which_files_are_read_does_not_matter(groups, random):
    workers = [
        [each for each in group if each.rank == rank] for group in groups for rank in range(4)
    ]
    expected = account(groups_of(each for rows in workers for each in rows))
    random.shuffle(workers)
    shuffled = account(groups_of(each for rows in workers for each in rows))
    assert shuffled == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"workers": 300_000_000},
        {"images": 10**400},
        {"began": -math.inf},
        {"seconds": {"train": "x"}},
    ],
)
def test_a_row_that_can_not_be_is_left_out(tmp_path, change):
    run = locate(str(tmp_path))
    row = {"group": "a", "rank": 0, "workers": 1, "began": 1.0, "at": 2.0, "images": 8}
    lines = [{**row, "seconds": {}}, {**row, "seconds": {"train": 1.0}, **change}]
    (run / "ledger" / "a-0000.jsonl").write("".join(f"{json.dumps(x)}\n" for x in lines).encode())
    (found,) = read_ledger(run)
    # Of an older version, which knew fewer bins.
    assert set(found.seconds) == set(BINS) and not any(found.seconds.values())
