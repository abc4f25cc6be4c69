"""A simulated run on a spot trace: no time is lost sight of, and no fault helps."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cat_ray.cli import app
from cat_ray.errors import BadInput
from cat_ray.operations.goodput import BINS, LEDGER, Row
from cat_ray.operations.recovery import RecoveryTimes, measured_by, recovery_times
from cat_ray.operations.replay import Replayed, Terms, replay
from cat_ray.operations.spot_trace import (
    Change,
    Trace,
    changes,
    read_trace,
    synthetic_trace,
    to_csv,
)
from cat_ray.storage import locate

ONE_PER_NODE_HOUR = Path(__file__).parents[2] / "jobs" / "traces" / "one_per_node_hour.csv"
SYNTHETIC = synthetic_trace(8, 1.0, 600.0, 24.0, seed=35)
# A save takes a moment and a restart without notice longer than one with it.
TERMS = Terms(
    total_images=200_000,
    batch_size=100,
    save_every_images=5_000,
    lanes=64,
    gpus_per_node=1,
    minimum_nodes=1,
    images_per_gpu_second=1.0,
    stall_seconds=0.5,
    stored_seconds=0.0,
    save_fixed_seconds=1.0,
    killed_seconds=30.0,
    drained_seconds=20.0,
    joined_seconds=25.0,
    restore_seconds=5.0,
    notice_seconds=120.0,
)
WITHOUT = replace(TERMS, notice_seconds=0.0)
LIMIT = 3e6

times = st.lists(st.floats(1.0, 40_000.0), max_size=40, unique=True).map(sorted)
fleets = st.lists(
    st.tuples(st.floats(1.0, 20_000.0), st.integers(0, 3), st.integers(0, 3)), max_size=40
)
notices = st.sampled_from([TERMS, WITHOUT])


def swaps(at: list[float], nodes: int = 8) -> list[Change]:
    """One of the nodes is taken and at once replaced, at these times."""
    return [Change(0.0, 0, nodes), *(Change(seconds, 1, nodes) for seconds in at)]


def fleet(steps: list[tuple[float, int, int]]) -> list[Change]:
    """Nodes that go and come: seconds after the one before, how many go, how many come."""
    made, at, nodes = [Change(0.0, 0, 4)], 0.0, 4
    for seconds, gone, come in steps:
        at += seconds
        lost = min(gone, nodes)
        if lost or come:
            nodes = nodes - lost + come
            made.append(Change(at, lost, nodes))
    return made


def node_seconds(made: list[Change], until: float) -> float:
    ends = [*(change.at for change in made[1:]), until]
    return sum(
        change.nodes * max(0.0, min(end, until) - change.at)
        for change, end in zip(made, ends, strict=True)
        if change.at < until
    )


# What holds of every run.


@given(fleets, notices)
def test_every_node_second_is_in_one_bin(steps, terms):
    made = fleet(steps)
    found = replay(terms, made, LIMIT)
    assert all(seconds >= -1e-6 for seconds in found.node_seconds.values())
    assert found.total_node_seconds == pytest.approx(node_seconds(made, found.seconds), abs=1e-3)


@given(fleets, notices)
def test_images_are_kept_or_lost_and_were_all_trained_on(steps, terms):
    # One node more trains one image more per second: node-seconds are images.
    found = replay(terms, fleet(steps), LIMIT)
    limited = all(change.nodes in (0, 1, 2, 4, 8, 16, 32, 64) for change in fleet(steps))
    if limited:
        assert found.node_seconds["train"] == pytest.approx(found.images, rel=1e-6, abs=0.01)
        assert found.node_seconds["lost"] == pytest.approx(found.lost_images, rel=1e-6, abs=0.01)


@given(st.integers(1, 80), notices)
def test_without_interruptions_nothing_is_lost(nodes, terms):
    found = replay(terms, [Change(0.0, 0, nodes)], LIMIT)
    saves = terms.total_images // terms.save_every_images - 1
    expected = terms.killed_seconds + terms.total_images / terms.rate(nodes)
    assert found.finished and (found.lost_images, found.interruptions) == (0, 0)
    assert found.node_seconds["lost"] == found.node_seconds["idle"] == 0
    assert found.seconds == pytest.approx(expected + saves * terms.stall_seconds)


@given(fleets)
def test_notice_is_never_worse(steps):
    # Giving way takes 26 s with its save, a restart without notice 35 s.
    made = fleet(steps)
    told, untold = replay(TERMS, made, LIMIT), replay(WITHOUT, made, LIMIT)
    assert told.seconds <= untold.seconds + 1e-6
    assert told.images >= untold.images - 1e-6
    if not untold.finished:
        assert told.goodput >= untold.goodput - 1e-9 or told.finished


@given(fleets)
def test_with_notice_at_most_a_step_is_lost_each_time(steps):
    found = replay(TERMS, fleet(steps), LIMIT)
    assert found.lost_images <= (found.interruptions + found.joins) * TERMS.batch_size + 1e-6


@given(times, times, notices)
def test_more_interruptions_never_help(some, others, terms):
    few = replay(terms, swaps(some), LIMIT)
    many = replay(terms, swaps(sorted({*some, *others})), LIMIT)
    assert many.seconds >= few.seconds - 1e-6
    assert many.images <= few.images + 1e-6


@given(times)
def test_at_most_the_work_since_a_complete_save_is_lost_each_time(at):
    found = replay(WITHOUT, swaps(at), LIMIT)
    under_way = WITHOUT.rate(8) * WITHOUT.save_seconds(8)
    most = WITHOUT.save_every_images + under_way
    assert found.lost_images <= found.interruptions * most + 1e-6


# Cases worked out by hand.


def test_a_loss_goes_back_to_the_last_complete_save():
    # 30 s to start, then 8 images a second: the save at 5,000 images is complete 1 s after 655 s.
    def after(seconds: float) -> Replayed:
        return replay(WITHOUT, swaps([seconds]), seconds + 1)

    assert after(655.5).lost_images == pytest.approx(5000)
    assert after(656.5).lost_images == pytest.approx(8 * 1.0)
    assert after(656.5).images == 5000


def test_with_notice_the_last_whole_step_is_kept():
    found = replay(TERMS, swaps([130.1]), 140.0)
    assert (found.images, found.lost_images) == (800.0, pytest.approx(0.8))


def test_a_save_that_does_not_fit_the_notice_is_made_by_those_that_stay():
    slow = replace(TERMS, save_fixed_seconds=0.0, stored_seconds=800.0)
    # 100 s by eight nodes, too long for 120 s with a margin of 1.5; 400 s by the two that stay.
    assert slow.leaving_seconds(8, 6) == 400.0
    assert slow.leaving_seconds(8, 8) is None
    assert replace(slow, stored_seconds=80.0).leaving_seconds(8, 8) == 10.0


def test_a_run_waits_for_its_least_nodes_and_starts_with_all_that_came():
    terms = replace(TERMS, minimum_nodes=2)
    made = [Change(0, 0, 1), Change(100, 0, 2), Change(110, 0, 4)]
    found = replay(terms, made, 200.0)
    assert found.node_seconds["idle"] == 100.0
    assert found.node_seconds["start"] == 2 * 10 + 4 * 20
    assert (found.joins, found.images) == (0, 4 * 70)


def test_workers_without_a_lane_of_their_own_do_not_help():
    assert [TERMS.rate(nodes) for nodes in (0, 1, 32, 33, 63, 64, 99)] == [0, 1, 32, 32, 32, 64, 64]


def test_a_run_that_can_not_go_on_is_given_up():
    found = replay(TERMS, [Change(0.0, 0, 8), Change(50.0, 8, 0)], 1000.0)
    assert not found.finished
    assert (found.seconds, found.total_node_seconds) == (1000.0, 400.0)


# Traces.


def test_a_trace_is_read_as_it_was_written(tmp_path: Path):
    place = tmp_path / "trace.csv"
    place.write_text(to_csv(SYNTHETIC, "two\nlines"))
    assert read_trace(str(place)) == SYNTHETIC
    assert read_trace(str(ONE_PER_NODE_HOUR)) == SYNTHETIC
    assert pytest.approx(1.0, abs=0.01) == SYNTHETIC.interruptions_per_node_hour


def test_a_published_trace_is_read_as_it_is(tmp_path: Path):
    place = tmp_path / "us-west-2a_v100_1.json"
    place.write_text(json.dumps({"metadata": {"gap_seconds": 300}, "data": [16, 16, 0, 9]}))
    assert read_trace(str(place)) == Trace((0, 300, 600, 900), (16, 16, 0, 9), 1200)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "time,nodes\n0,1\n1,1\n",
        "seconds,nodes\n0,1\n",
        "seconds,nodes\n5,1\n9,1\n",
        "seconds,nodes\n0,1\n2,1\n2,3\n",
        "seconds,nodes\n0,0\n9,0\n",
        "seconds,nodes\n0,x\n9,0\n",
        "seconds,nodes\n0,1\nnan,1\n",
        "seconds,nodes\n0,1\ninf,1\n",
        "seconds,nodes\n0,1\n1e-6,0\n2e-6,1\n",
        "seconds,nodes\n0,1\n99,10000000000000\n999,1\n",
        f"seconds,nodes\n0,{'9' * 400}\n999,1\n",
        '{"metadata": {"gap_seconds": 1e999}, "data": [1, 2]}',
        '{"metadata": {"gap_seconds": 60}, "data": [1e999, 2]}',
        '{"metadata": {"gap_seconds": 60}, "data": []}',
        '{"data": ' + "[" * 100_000,
    ],
)
def test_what_is_no_trace_is_refused_in_a_line(tmp_path: Path, text: str):
    place = tmp_path / "trace.csv"
    place.write_text(text)
    with pytest.raises(BadInput, match="is no trace") as caught:
        read_trace(str(place))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(BadInput, match="can't read the trace"):
        read_trace(str(tmp_path / "missing.csv"))


@given(st.integers(1, 40), st.integers(0, 3))
def test_changes_add_up_and_keep_to_what_is_wanted(wanted: int, seed: int):
    seen = list(itertools.islice(changes(SYNTHETIC, wanted, seed), 300))
    assert seen == list(itertools.islice(changes(SYNTHETIC, wanted, seed), 300))
    for before, change in itertools.pairwise(seen):
        assert before.at < change.at
        assert 0 <= change.lost <= before.nodes
        assert change.nodes <= wanted
        assert change.nodes >= before.nodes - change.lost
        assert change.lost or change.nodes > before.nodes


@pytest.mark.parametrize("wanted", [2, 8, 64])
def test_a_node_is_interrupted_as_often_in_a_run_of_any_size(wanted: int):
    lost, held = 0, 0.0
    seen = itertools.takewhile(
        lambda pair: pair[1].at < 20 * SYNTHETIC.end, itertools.pairwise(changes(SYNTHETIC, wanted))
    )
    for before, change in seen:
        lost += change.lost
        held += before.nodes * (change.at - before.at) / 3600
    assert lost / held == pytest.approx(1.0, rel=0.15)


def test_a_trace_without_changes_has_none():
    assert list(changes(Trace((0,), (4,), 100), 9)) == [Change(0.0, 0, 9)]


# Measured times.


def row(group: str, workers: int, began: float, at: float, images: int, outcome=None) -> Row:
    return Row(group, 0, workers, began, at, images, dict.fromkeys(BINS, 0.0), outcome, "s")


# Killed at 100 s, then stepping at 112 s; gives way at 200 s, steps at 209 s; grows at 300 s.
LEDGER_ROWS = [
    row("a", 1, 0, 5, 0),
    row("a", 1, 0, 100, 64),
    row("b", 1, 104, 104, 32),
    row("b", 1, 104, 112, 48),
    row("b", 1, 104, 200, 96, "yielded"),
    row("c", 1, 202, 202, 96),
    row("c", 1, 202, 209, 112),
    row("c", 1, 202, 300, 160, "yielded"),
    replace(row("d", 2, 303, 303, 160)),
    replace(row("d", 2, 303, 317, 176)),
]


def test_recovery_times_are_read_off_a_ledger(tmp_path: Path):
    found = recovery_times(LEDGER_ROWS, "here")
    assert (found.killed, found.drained, found.joined) == (12, 9, 17)
    assert "1 killed, 1 drained, 1 joined" in found.source
    only_first = recovery_times(LEDGER_ROWS[:2], "here")
    assert only_first.killed == RecoveryTimes().killed
    run = locate(str(tmp_path))
    with pytest.raises(BadInput, match="no ledger"):
        measured_by(run)
    lines = [json.dumps(each.__dict__).encode() + b"\n" for each in LEDGER_ROWS]
    (run / LEDGER / "all.jsonl").write(b"".join(lines))
    checkpoint = {"kind": "checkpoint", "session": "a", "images": 32}
    checkpoint |= {"seconds": 3.0, "stall_seconds": 0.1}
    (run / "metrics.jsonl").write(json.dumps(checkpoint).encode() + b"\n")
    measured = measured_by(run)
    assert (measured.times.killed, measured.stored_seconds, measured.stall_seconds) == (12, 3, 0.1)


# The command, on the trace with one interruption per node-hour.

JOB = """
run: {folder: x, total_images: 19999744}
data: {shards: "s3://bucket/latents", num_classes: 1000}
model: {generator: {size: B}}
optimisation: {lanes: 512, activation_checkpointing: true}
checkpoints: {save_every_images: 200000}
workers: {minimum: 8, maximum: 64, gpu: true}
"""


def test_the_command_tells_goodput_with_notice_and_without(tmp_path: Path):
    job = tmp_path / "job.yaml"
    job.write_text(JOB)
    arguments = ["plan", str(job), "--replay", str(ONE_PER_NODE_HOUR)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.output)
    assert values["trace"]["interruptions_per_node_hour"] == pytest.approx(1, abs=0.01)
    assert [case["gpus"] for case in values["cases"]] == [8, 64, 512, 4096]
    sixty_four = values["cases"][1]
    assert 0.5 < sixty_four["goodput_without_notice"] < sixty_four["goodput_with_notice"] < 1
    lost = [sixty_four[notice]["lost_images"] for notice in ("with_notice", "without_notice")]
    assert lost[0] < lost[1] / 10


def test_the_command_s_table_fits_and_a_cpu_has_no_rate(tmp_path: Path):
    job = tmp_path / "job.yaml"
    small = "{depth: 4, width: 32, heads: 2}"
    job.write_text(JOB.replace("{size: B}", f"{{size: {small}}}, discriminator: {{size: {small}}}"))
    arguments = ["plan", str(job), "--replay", str(ONE_PER_NODE_HOUR), "--gpus", "8"]
    given = ["--restart-seconds", "1", "--save-seconds", "2"]
    result = CliRunner().invoke(app, [*arguments, *given], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 100
    assert "1.0 s without notice" in result.output
    result = CliRunner().invoke(app, [*arguments, "--gpu", "cpu"])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
