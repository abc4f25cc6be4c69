"""What a drill finds: how long each fault took to recover from, and which promises were kept."""

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from ray.cluster_utils import Cluster
from rich.console import Console

from cat_ray.checkpoint.layout import GENERATOR, State
from cat_ray.config import Config, dump, flatten, parse
from cat_ray.data.index import INDEX_NAME, Index, Shard
from cat_ray.data.stream import CPUS_PER_READ
from cat_ray.errors import BadInput, RunFailed
from cat_ray.operations import drill as drilling
from cat_ray.operations.drill import (
    Drilled,
    Recovery,
    default_schedule,
    drill,
    drill_tables,
)
from cat_ray.operations.goodput import BINS, LEDGER, Row
from cat_ray.operations.identity import differences
from cat_ray.operations.sample_keys import SampleKeys
from cat_ray.storage import Location, locate
from cat_ray.training.elasticity import drain_node
from cat_ray.training.faults import BY_WORKER, FAULTS, Fault

# The tiny job: 64 images, 16 in a batch, saved every 32.
TOTAL, BATCH, LANES = 64, 16, 4
PATIENCE_SECONDS = 60


def row(group: str, began: float, at: float, images: int, rank: int = 0) -> Row:
    return Row(group, rank, 2, began, at, images, dict.fromkeys(BINS, 0.0))


@pytest.fixture
def job(tiny_job: str) -> Config:
    return parse(tiny_job, "job.yaml")


# The schedule without one.


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("workers.minimum=1",),
        ("workers={minimum: 3, maximum: 4}", "checkpoints.save_every_images=1000"),
        ("optimisation={batch_size: 8, lanes: 2}", "run.total_images=8"),
    ],
)
def test_the_default_is_each_fault_of_a_worker_once_in_a_job_that_fits(tiny_job, changes):
    job = parse(tiny_job, "job.yaml", changes)
    config, faults = default_schedule(job)
    assert [fault.kind for fault in faults] == list(BY_WORKER)
    # Whatever nodes come and go, there is a worker of each of these ranks.
    assert {fault.rank for fault in faults} <= set(range(job.workers.minimum))
    # A save may be refused or damaged: there is an older one to go back to.
    every = config.checkpoints.save_every_images
    times = [0, *(fault.images for fault in faults), config.run.total_images]
    assert all(later - earlier > 2 * every for earlier, later in pairwise(times))
    # Still a job, and the same but for its length and saves.
    assert parse(dump(config), "job.yaml") == config
    assert {key for key, value in flatten(config).items() if value != flatten(job)[key]} <= {
        "run.total_images",
        "checkpoints.save_every_images",
    }


def test_uploads_are_refused_and_files_cut_by_the_worker_that_commits(job):
    _, faults = default_schedule(job)
    ranks = {fault.kind: fault.rank for fault in faults}
    assert ranks["refuse"] == ranks["truncate"] == 0
    assert ranks["kill"] == job.workers.minimum - 1


# A drill whose training left this behind.


@dataclass
class Left:
    """What a run with faults leaves behind: a ledger, records of faults, samples, a checkpoint."""

    rows: list[Row] = field(default_factory=list)
    # By place in the schedule: when it came, and after which step.
    strikes: dict[int, tuple[float, int]] = field(default_factory=dict)
    # Places in the stream, in images, from which and up to which each group wrote samples.
    samples: dict[str, tuple[int, int]] = field(default_factory=lambda: {"a": (0, TOTAL)})
    # A shard has so many images.
    epoch_images: int = TOTAL
    images: int = TOTAL
    failure: str = ""
    # By how much its weights are away from those of a run without faults.
    astray: float = 0.0


Drill = Callable[[Sequence[Fault], Left], Drilled]


@pytest.fixture
def run_drill(job, monkeypatch, save_checkpoint) -> Drill:
    """A drill of the tiny job, whose training leaves behind what the test says."""

    def act(faults: Sequence[Fault], left: Left) -> Drilled:
        shard = Shard("0.tar", left.epoch_images, 10**6, "hash")
        index = Index("images", 32, 1, (left.epoch_images,), "", (shard,), "")
        (locate(job.data.shards) / INDEX_NAME).write(index.to_json())
        runs: list[str] = []

        def train(config: Config, given: Sequence[Fault] = ()) -> Location:
            run, disturbed = locate(config.run.folder), not runs
            assert given == (faults if disturbed else ())
            assert run.uri not in runs
            runs.append(run.uri)
            came = left if disturbed else Left(undisturbed(), epoch_images=left.epoch_images)
            write(run, faults, came)
            if came.images:
                weights = {GENERATOR: {"weight": torch.ones(4) + came.astray}}
                save_checkpoint(run, State(came.images, 0, "digest", dump(config), {}), weights)
            if came.failure:
                raise RunFailed(came.failure)
            return run / "report.html"

        monkeypatch.setattr(drilling, "train", train)
        return drill(job, faults)

    return act


def write(run: Location, faults: Sequence[Fault], left: Left) -> None:
    files: dict[str, str] = {}
    for each in left.rows:
        name = f"{each.group}-{each.rank:04d}.jsonl"
        files[name] = files.get(name, "") + json.dumps(asdict(each)) + "\n"
    for name, content in files.items():
        (run / LEDGER / name).write(content.encode())
    for place, (at, images) in left.strikes.items():
        record = {**asdict(faults[place]), "images": images, "at": at, "node": "n"}
        (run / FAULTS / f"{place:03d}.json").write(json.dumps(record).encode())
    for group, (start, stop) in left.samples.items():
        record = SampleKeys(run, group, 0)
        for images in range(start, stop, BATCH):
            keys = [str(image % left.epoch_images) for image in range(images, images + BATCH)]
            noise = np.full((BATCH, 2), images, dtype=np.float32)
            record.add(images, range(LANES), np.asarray(keys), noise)


def undisturbed() -> list[Row]:
    return [row("a", 10, 11, 0), row("a", 10, 13, 16), row("a", 10, 19, TOTAL)]


def restarted(images: int, *, start: int, first_step: float) -> list[Row]:
    """A group that got to so many images, and one that went on, from a save, at 100 s."""
    later = start + BATCH
    return [
        *(row("a", 10, 11 + seen / 16, seen) for seen in range(0, images + 1, BATCH)),
        # A worker that nothing befell writes a last row.
        row("a", 10, 99, images, rank=1),
        row("b", 100, 101, start),
        row("b", 100, first_step, later, rank=1),
        row("b", 100, first_step + 0.5, later),
        row("b", 100, first_step + 10, TOTAL),
    ]


# Recoveries.


def test_a_recovery_lasts_until_the_first_new_step_of_any_worker(run_drill):
    fault = Fault("kill", 40, 1)
    left = Left(restarted(48, start=32, first_step=104.25), {0: (98.0, 48)})
    found = run_drill([fault], left)
    assert found.recoveries == (Recovery(fault, 98.0, 6.25, 16),)


@pytest.mark.parametrize(("start", "lost"), [(48, 0), (32, 16), (0, 48)])
def test_lost_is_what_was_trained_on_again(run_drill, start, lost):
    left = Left(restarted(48, start=start, first_step=104.0), {0: (98.0, 48)})
    (recovery,) = run_drill([Fault("kill", 48)], left).recoveries
    assert (recovery.seconds, recovery.lost_images) == (6.0, lost)


def test_each_fault_is_recovered_from_in_the_group_after_it(run_drill):
    rows = [
        *(row("c", 10, 11 + at, 16 * at) for at in range(3)),
        *(row("a", 50, 52 + at, 32 + 16 * at) for at in range(2)),
        *(row("b", 90, 93 + at, 32 + 16 * at) for at in range(3)),
    ]
    faults = [Fault("raise", 32), Fault("kill", 48)]
    found = run_drill(faults, Left(rows, {0: (40.0, 32), 1: (80.0, 48)}))
    assert found.recoveries == (
        Recovery(faults[0], 40.0, 13.0, 0),
        Recovery(faults[1], 80.0, 14.0, 16),
    )


def test_a_group_that_went_on_needed_no_recovery(run_drill):
    fault = Fault("refuse", 16)
    found = run_drill([fault], Left(undisturbed(), {0: (12.0, 16)}))
    assert found.recoveries == (Recovery(fault, 12.0, None, 0),)


def test_uploads_that_were_refused_are_not_charged_with_a_later_fault(run_drill):
    faults = [Fault("refuse", 16), Fault("kill", 48)]
    left = Left(restarted(48, start=32, first_step=104.0), {0: (12.0, 16), 1: (98.0, 48)})
    refused, killed = run_drill(faults, left).recoveries
    assert (refused.seconds, refused.lost_images) == (None, 0)
    assert (killed.seconds, killed.lost_images) == (6.0, 16)


def test_a_fault_that_never_came_fails_the_drill(run_drill):
    faults = [Fault("refuse", 16), Fault("kill", 640)]
    found = run_drill(faults, Left(undisturbed(), {0: (12.0, 16)}))
    assert found.recoveries[1] == Recovery(faults[1], None, None, 0)
    assert all(kept for _, kept, _ in found.promises)
    assert not found.passed


# Promises.

OWN = 3
SAME = ["same: images seen", "same: samples", "same: random streams", "same: generator"]


def kept(found: Drilled) -> list[bool]:
    return [each for _, each, _ in found.promises]


def told(found: Drilled) -> list[str]:
    return [measured for _, _, measured in found.promises]


def test_a_run_that_came_through_as_if_nothing_had_happened_passes(run_drill):
    left = Left(
        restarted(48, start=32, first_step=104.0),
        {0: (98.0, 48)},
        samples={"a": (0, 48), "b": (32, TOTAL)},
    )
    found = run_drill([Fault("kill", 48)], left)
    assert found.passed
    assert kept(found) == [True] * (OWN + len(SAME))
    assert [promise for promise, _, _ in found.promises][OWN:] == SAME
    assert told(found)[:2] == ["64", "64 of 64 images, 0 of them twice"]
    assert told(found)[2].startswith("images-000000000064-")


@pytest.mark.parametrize("astray", [1e-6, 1.0])
def test_weights_that_came_out_otherwise_are_told(run_drill, astray):
    found = run_drill([], Left(undisturbed(), astray=astray))
    assert kept(found) == [True] * (OWN + 3) + [False]
    assert not found.passed


def test_with_other_nodes_only_what_went_in_is_compared(run_drill, nodes):
    fault = Fault("drain", 16)
    found = run_drill([fault], Left(undisturbed(), {0: (12.0, 16)}, astray=1.0))
    assert [promise for promise, _, _ in found.promises][OWN:] == SAME[:3]
    assert found.passed


def test_a_run_that_failed_is_told_with_its_reason_and_compared_with_none(run_drill):
    left = Left(undisturbed(), samples={"a": (0, 32)}, images=32, failure="failed too often")
    found = run_drill([], left)
    assert kept(found) == [False, False, True]
    assert told(found)[:2] == ["failed too often", "32 of 64 images, 0 of them twice"]


def test_a_run_that_failed_after_its_last_save_has_failed(run_drill):
    found = run_drill([], Left(undisturbed(), failure="failed too often"))
    assert kept(found) == [False, True, True]
    assert told(found)[0] == "failed too often"


def test_a_run_that_stopped_short_did_not_reach_its_end(run_drill):
    found = run_drill([], Left(undisturbed(), images=48))
    assert kept(found) == [False, True, True]
    assert told(found)[0] == "48"


@pytest.mark.parametrize(
    ("samples", "measured"),
    [
        ({"a": (0, 48)}, "48 of 64 images, 0 of them twice"),
        ({"a": (16, TOTAL)}, "samples are missing at 0 images"),
        ({}, "0 of 64 images, 0 of them twice"),
    ],
)
def test_images_that_were_left_out_are_told(run_drill, samples, measured):
    found = run_drill([], Left(undisturbed(), samples=samples))
    assert kept(found) == [True, False, True]
    assert told(found)[1] == measured


def test_images_that_two_groups_count_are_told(run_drill):
    rows = restarted(32, start=32, first_step=104.0)
    found = run_drill([], Left(rows, samples={"a": (0, 32), "b": (16, TOTAL)}))
    assert kept(found) == [True, False, True]
    assert told(found)[1] == "lane 0 at 16 images was done twice"


def test_images_that_came_twice_in_an_epoch_are_told(run_drill, monkeypatch):
    monkeypatch.setattr(drilling, "repeated", lambda trained, images: ["0.tar/3"] * (images == 64))
    found = run_drill([], Left(undisturbed()))
    assert kept(found) == [True, False, True]
    assert told(found)[1] == "64 of 64 images, 1 of them twice"


def test_an_image_may_come_again_in_the_next_epoch(run_drill):
    assert run_drill([], Left(undisturbed(), epoch_images=TOTAL // 2)).passed


def test_a_run_without_a_checkpoint_is_told(run_drill):
    found = run_drill([], Left(undisturbed(), images=0))
    assert kept(found) == [False, True, False]
    assert told(found)[2] == "no checkpoint"


# What training is given.


def seen(job: Config, monkeypatch, faults: Sequence[Fault]) -> Config:
    """The job as the run with faults gets it."""
    given = []

    def train(config: Config, faults: Sequence[Fault]) -> Location:
        given.append(config)
        raise BadInput("enough seen")

    monkeypatch.setattr(drilling, "train", train)
    with pytest.raises(BadInput, match="enough seen"):
        drill(job, faults)
    return given[0]


def test_a_drill_begins_a_run_of_its_own(job, monkeypatch):
    folder = seen(job, monkeypatch, []).run.folder
    assert folder not in (job.run.folder, job.data.shards)
    (locate(folder) / "checkpoints" / "begun").write(b"")
    monkeypatch.setattr(drilling, "train", lambda *_: pytest.fail("trains"))
    with pytest.raises(BadInput, match="isn't empty: a drill begins a run of its own"):
        drill(job, [])


def test_a_drill_keeps_the_proof_and_survives_all_that_it_does_itself(job, monkeypatch):
    assert (job.reporting.sample_keys, job.workers.max_failures) == (False, 0)
    config = seen(job, monkeypatch, [Fault("kill", 16), Fault("raise", 32)])
    assert config.reporting.sample_keys
    assert config.workers.max_failures >= 2
    assert config.workers.stall_seconds < job.workers.stall_seconds


@pytest.mark.parametrize(
    ("key", "value"), [("max_failures", 7), ("stall_seconds", 2.5), ("maximum", 3)]
)
def test_what_is_stricter_or_larger_in_the_job_stays(tiny_job, monkeypatch, key, value):
    job = parse(tiny_job, "job.yaml", [f"workers.{key}={value}"])
    assert getattr(seen(job, monkeypatch, [Fault("kill", 16)]).workers, key) == value


def test_a_drill_trains_what_the_job_would(job, monkeypatch):
    assert differences(seen(job, monkeypatch, [Fault("kill", 16)]), job) == []


# Faults of nodes.


@dataclass
class Nodes:
    """The cluster that a drill makes for faults of nodes, with two of them, and what befell it."""

    cluster: Any = field(default_factory=lambda: create_autospec(Cluster, instance=True))
    drain: Any = field(default_factory=lambda: create_autospec(drain_node))
    made: list[tuple[int, int]] = field(default_factory=list)

    @contextmanager
    def make(self, workers: int, cpus: int) -> Iterator[Cluster]:
        self.made.append((workers, cpus))
        names = ("first", "second")
        self.cluster.worker_nodes = [SimpleNamespace(node_id=name) for name in names]
        yield self.cluster


@pytest.fixture
def nodes(monkeypatch) -> Nodes:
    nodes = Nodes()
    monkeypatch.setattr(drilling, "_nodes", nodes.make)
    monkeypatch.setattr(drilling, "drain_node", nodes.drain)
    monkeypatch.setattr(drilling, "POLL_SECONDS", 0.002)
    return nodes


def befall(
    job: Config, monkeypatch, faults: Sequence[Fault], on: str, done: Any, announced: int = 1
) -> Config:
    """A drill in which the first faults are announced on a node, until it is done; its job."""
    given = []

    def train(config: Config, faults: Sequence[Fault]) -> Location:
        given.append(config)
        for place in range(announced):
            record = locate(config.run.folder) / FAULTS / f"{place:03d}.json"
            record.write(json.dumps({"at": 10.0, "node": on}).encode())
        until = time.monotonic() + PATIENCE_SECONDS
        while done is not None and not done.called:
            assert time.monotonic() < until, "nothing befell a node"
            time.sleep(0.002)
        raise BadInput("enough seen")

    monkeypatch.setattr(drilling, "train", train)
    with pytest.raises(BadInput, match="enough seen"):
        drill(job, faults)
    return given[0]


def test_a_drained_node_is_told_so_with_a_deadline(job, monkeypatch, nodes):
    befall(job, monkeypatch, [Fault("drain", 16)], "second", nodes.drain)
    ((node, reason, deadline), _) = nodes.drain.call_args
    assert (node, reason) == ("second", "a drill")
    assert deadline > time.time()
    nodes.cluster.remove_node.assert_not_called()


def test_a_node_is_removed_without_a_word(job, monkeypatch, nodes):
    befall(job, monkeypatch, [Fault("remove", 16)], "second", nodes.cluster.remove_node)
    node = nodes.cluster.worker_nodes[1]
    nodes.cluster.remove_node.assert_called_once_with(node, allow_graceful=False)
    nodes.drain.assert_not_called()


def test_a_node_that_comes_is_as_large_as_the_others(job, monkeypatch, nodes):
    befall(job, monkeypatch, [Fault("add", 16)], "first", nodes.cluster.add_node)
    ((workers, cpus),) = nodes.made
    assert workers == job.workers.maximum
    nodes.cluster.add_node.assert_called_once_with(num_cpus=cpus)


def test_only_what_was_announced_befalls_a_node(job, monkeypatch, nodes):
    faults = [Fault("remove", 16), Fault("drain", 32), Fault("add", 48)]
    befall(job, monkeypatch, faults, "first", nodes.cluster.remove_node)
    assert (nodes.drain.called, nodes.cluster.add_node.called) == (False, False)


def test_what_a_worker_does_to_itself_befalls_no_node(job, monkeypatch, nodes):
    faults = [Fault("kill", 16), Fault("drain", 32)]
    befall(job, monkeypatch, faults, "first", nodes.drain, announced=2)
    assert (nodes.cluster.remove_node.called, nodes.cluster.add_node.called) == (False, False)


@pytest.mark.parametrize("cpus_per_worker", [0.25, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_each_worker_has_a_node_of_its_own_with_a_place_for_reading(
    tiny_job, monkeypatch, nodes, cpus_per_worker
):
    job = parse(tiny_job, "job.yaml", [f"workers.cpus_per_worker={cpus_per_worker}"])
    config = befall(job, monkeypatch, [Fault("add", 16)], "first", nodes.cluster.add_node)
    ((_, cpus),) = nodes.made
    taken = config.workers.cpus_per_worker
    assert taken >= cpus_per_worker
    assert cpus - taken >= CPUS_PER_READ
    assert cpus // taken == 1


def test_without_faults_of_nodes_no_cluster_is_made(job, monkeypatch, nodes):
    config = befall(job, monkeypatch, [Fault("kill", 16)], "first", None)
    assert config.workers.cpus_per_worker == job.workers.cpus_per_worker
    assert nodes.made == []


# For a person.


def test_the_tables_tell_each_fault_and_promise():
    found = Drilled(
        (
            Recovery(Fault("kill", 1600, 1), 10.0, 2.5, 1024),
            Recovery(Fault("refuse", 3200), 20.0, None, 0),
            Recovery(Fault("stop", 4800, 3), None, None, 0),
        ),
        (("the run reached its end", True, "64"), ("each image came exactly once", False, "63")),
    )
    text = io.StringIO()
    for table in drill_tables(found):
        Console(file=text, width=120).print(table)
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in text.getvalue().splitlines()
    ]
    for cells in (
        ["kill of rank 1", "1,600", "2.5 s", "1,024"],
        ["refuse of rank 0", "3,200", "went on", "0"],
        ["stop of rank 3", "4,800", "never came", ""],
        ["the run reached its end", "pass", "64"],
        ["each image came exactly once", "FAIL", "63"],
    ):
        assert cells in lines
