"""Faults of a drill: each comes once, to its own worker, and is written down before it does."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import create_autospec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.checkpoint.layout import DISCRIMINATOR, GENERATOR, State, slice_file
from cat_ray.checkpoint.read import newest_sound, verify
from cat_ray.checkpoint.write import CheckpointWriter
from cat_ray.errors import BadInput
from cat_ray.storage import Location, locate
from cat_ray.training import faults
from cat_ray.training.faults import (
    BY_WORKER,
    REFUSED_WRITES,
    Fault,
    Injected,
    Injector,
    Kind,
    parse_schedule,
    strike_of,
)

STEP = 16
some = settings(max_examples=80, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a worker in a cluster has a node."""
    context = SimpleNamespace(get_node_id=lambda: "this-node")
    monkeypatch.setattr(faults.ray, "get_runtime_context", lambda: context)


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What this process sends to itself from here on, in place of being sent it."""
    sent: list[int] = []

    def kill(process: int, number: int) -> None:
        assert process == os.getpid()
        sent.append(number)

    monkeypatch.setattr(os, "kill", kill)
    return sent


def writer() -> Any:
    return create_autospec(CheckpointWriter, instance=True, spec_set=True)


# The schedule.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kill@480", [Fault("kill", 480, 0)]),
        ("kill@480:1", [Fault("kill", 480, 1)]),
        ("raise@1_000_000:12", [Fault("raise", 1_000_000, 12)]),
        ("drain@64:1,kill@32", [Fault("kill", 32), Fault("drain", 64, 1)]),
        (" stop@32 , refuse@48:2 ", [Fault("stop", 32), Fault("refuse", 48, 2)]),
        (
            "raise@32:1,kill@16,truncate@32:0",
            [Fault("kill", 16), Fault("raise", 32, 1), Fault("truncate", 32, 0)],
        ),
    ],
)
def test_a_schedule_is_its_faults_in_the_order_of_images(text, expected):
    assert parse_schedule(text) == tuple(expected)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_can_be_asked_for(kind):
    assert parse_schedule(f"{kind}@32:1") == (Fault(kind, 32, 1),)


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("", ""),
        ("kill", "kill"),
        ("kill@", "kill@"),
        ("@32", "@32"),
        ("kil@32", "kil@32"),
        ("Kill@32", "Kill@32"),
        ("kill@many", "kill@many"),
        ("kill@-1", "kill@-1"),
        ("kill@1.5", "kill@1.5"),
        ("kill@32:", "kill@32:"),
        ("kill@32:x", "kill@32:x"),
        ("kill@32:1:2", "kill@32:1:2"),
        ("kill@32 raise@48", "kill@32 raise@48"),
        ("kill@32,", ""),
        ("kill@32, crash@48:1 ,raise@64", "crash@48:1"),
    ],
)
def test_an_entry_that_can_not_be_read_is_named_with_the_kinds_that_there_are(text, entry):
    with pytest.raises(BadInput) as caught:
        parse_schedule(text)
    message = str(caught.value)
    assert message.startswith(f"--schedule {entry}: write kind@images or kind@images:rank")
    assert message.endswith(", ".join(get_args(Kind)))


# When a fault comes.


def test_a_fault_comes_after_the_first_step_that_reaches_its_images(run):
    injector, told = Injector(run, [Fault("refuse", 40)], 0), writer()
    for images, expected in ((16, 0), (32, 0), (48, 1), (64, 1)):
        injector.strike(images, told)
        assert told.refuse.call_count == expected
    told.refuse.assert_called_once_with(REFUSED_WRITES)


def test_all_that_is_due_after_a_step_comes_in_order(run):
    schedule = [Fault("refuse", 3), Fault("raise", 5), Fault("refuse", 7), Fault("refuse", 64)]
    told = writer()
    with pytest.raises(Injected):
        Injector(run, schedule, 0).strike(16, told)
    assert told.refuse.call_count == 1
    Injector(run, schedule, 0).strike(16, told)
    assert told.refuse.call_count == 2
    assert [strike_of(run, place) is not None for place in range(4)] == [True, True, True, False]


def test_a_fault_comes_only_to_the_worker_of_its_rank(run):
    schedule = [Fault("raise", 16, 1), Fault("refuse", 16, 0), Fault("raise", 16, 2)]
    told = writer()
    Injector(run, schedule, 0).strike(32, told)
    assert told.refuse.call_count == 1
    assert [strike_of(run, place) is not None for place in range(3)] == [False, True, False]
    with pytest.raises(Injected):
        Injector(run, schedule, 1).strike(32, told)
    assert strike_of(run, 2) is None


def test_the_exception_tells_whose_doing_it_is(run):
    with pytest.raises(Injected, match="a fault of the drill at 1,600 images"):
        Injector(run, [Fault("raise", 1600)], 0).strike(1600, writer())


schedules = st.lists(
    st.builds(
        Fault, st.sampled_from(["raise", "refuse"]), st.integers(0, 10 * STEP), st.integers(0, 2)
    ),
    max_size=8,
).map(lambda listed: sorted(listed, key=lambda fault: fault.images))


@some
@given(schedules, st.data())
def test_each_fault_comes_once_and_in_order_however_often_the_run_starts_again(schedule, data):
    came: dict[int, list[str]] = {0: [], 1: []}
    told = {rank: writer() for rank in came}
    for rank, each in told.items():
        each.refuse.side_effect = lambda writes, rank=rank: came[rank].append("refuse")
    with tempfile.TemporaryDirectory() as folder:
        run, images, total = locate(folder), 0, 10 * STEP
        injectors = {rank: Injector(run, schedule, rank) for rank in came}
        while images < total:
            images += STEP
            failed = False
            for rank, injector in injectors.items():
                try:
                    injector.strike(images, told[rank])
                except Injected:
                    came[rank].append("raise")
                    failed = True
            if failed:
                images = STEP * data.draw(st.integers(0, images // STEP))
            if failed or data.draw(st.booleans()):
                injectors = {rank: Injector(run, schedule, rank) for rank in came}
        # A step that fails at the very end may leave what was due with it to nobody.
        for rank, injector in injectors.items():
            while True:
                try:
                    injector.strike(total, told[rank])
                    break
                except Injected:
                    came[rank].append("raise")
    for rank, kinds in came.items():
        assert kinds == [fault.kind for fault in schedule if fault.rank == rank]


# What is written down.


def test_the_record_tells_what_came_where_and_at_which_step(run):
    with pytest.raises(Injected):
        Injector(run, [Fault("refuse", 0, 1), Fault("raise", 40, 2)], 2).strike(48, writer())
    strike = strike_of(run, 1)
    assert strike is not None
    assert isinstance(strike.pop("at"), float)
    assert strike == {"kind": "raise", "images": 48, "rank": 2, "node": "this-node"}
    assert strike_of(run, 0) is None


@pytest.mark.parametrize("kind", BY_WORKER)
def test_a_fault_that_can_not_be_written_down_does_not_come(run, monkeypatch, signals, kind):
    def refused(place: Location, content: bytes) -> None:
        raise BadInput(f"storage failed at {place.uri}")

    told = writer()
    with monkeypatch.context() as patched, pytest.raises(BadInput, match="storage failed"):
        patched.setattr(Location, "write", refused)
        Injector(run, [Fault(kind, 16)], 0).strike(16, told)
    assert signals == []
    assert told.mock_calls == []


@pytest.mark.parametrize("kind", sorted(set(get_args(Kind)) - set(BY_WORKER)))
def test_a_fault_of_a_node_is_only_announced_by_the_worker_on_it(run, signals, kind):
    told = writer()
    Injector(run, [Fault(kind, 16)], 0).strike(16, told)
    strike = strike_of(run, 0)
    assert strike is not None and strike["node"] == "this-node"
    assert signals == []
    assert told.mock_calls == []


# What befalls a worker.


@pytest.mark.parametrize(("kind", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_a_worker_is_sent_its_signal(run, signals, kind, number):
    Injector(run, [Fault(kind, 16)], 0).strike(16, writer())
    assert signals == [number]


KILLED = """
import sys
from types import SimpleNamespace
from cat_ray.storage import locate
from cat_ray.training import faults

context = SimpleNamespace(get_node_id=lambda: "this-node")
faults.ray.get_runtime_context = lambda: context
faults.Injector(locate(sys.argv[1]), faults.parse_schedule("kill@16"), 0).strike(16, None)
print("went on")
"""


def test_a_killed_worker_is_gone_and_the_next_one_goes_on(run):
    ends = [
        subprocess.run([sys.executable, "-c", KILLED, run.uri], capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [(end.returncode, end.stdout) for end in ends] == [
        (-signal.SIGKILL, ""),
        (0, "went on\n"),
    ], ends


def test_the_newest_checkpoints_largest_file_is_cut_once_it_is_whole(run, signals, save_checkpoint):
    def save(images: int) -> Location:
        groups = {
            GENERATOR: {"weight": torch.ones(images)},
            DISCRIMINATOR: {"weight": torch.ones(1000 + images)},
        }
        return save_checkpoint(run, State(images, 0, "digest", "", {}), groups)

    before = save(16)
    told = writer()
    # The save that is under way is waited for: it is the one to damage.
    told.wait.side_effect = lambda: saved.append(save(32))
    saved: list[Location] = []
    Injector(run, [Fault("truncate", 32)], 0).strike(32, told)
    assert signals == [signal.SIGKILL]
    (line,) = verify(saved[0])
    assert slice_file(DISCRIMINATOR, 0, 1) in line
    assert newest_sound(run) == before


def test_without_a_checkpoint_there_is_none_to_cut(run, signals):
    Injector(run, [Fault("truncate", 16)], 0).strike(16, writer())
    assert signals == [signal.SIGKILL]
