"""The storage is killed, slowed, refuses and breaks off, again and again: a run loses nothing."""

import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from cat_ray.checkpoint.layout import STATE, read_manifest
from cat_ray.checkpoint.read import newest, read_state
from cat_ray.data.index import read_index
from cat_ray.data.prepare import digits, prepare
from cat_ray.operations.comparison import starts_of
from cat_ray.operations.cost import summarise
from cat_ray.operations.goodput import groups_of, read_ledger
from cat_ray.operations.journal import read_rows
from cat_ray.operations.outcome import OUTCOME
from cat_ray.operations.sample_keys import repeated, trained_on
from cat_ray.section import Storage
from cat_ray.storage import Location, locate

COMMAND = str(Path(sys.executable).with_name("cat-ray"))
LOG_EVERY, GRID_EVERY, SAVE_EVERY = 64, 256, 128
WORKERS = 2
# What a night must hit, whatever its schedule does.
KINDS = ("shard", "journal", "ledger", "grid", "upload", "manifest", "lease", "restore")
# Against hanging only.
LONGEST_SECONDS = 1500
SHORT = {"windows": 4, "shortest": 1.0, "longest": 3.0, "pause": 3.0}
LONG = {"windows": 20, "shortest": 2.0, "longest": 15.0, "pause": 6.0}


class Run:
    """The tiny job on shards in S3, behind an endpoint; its folder lies wherever it is put."""

    def __init__(self, job: Path, folder: str, shards: Location, endpoint_url: str, images: int):
        self._log, self.images = job.with_suffix(".log"), images
        changes = (
            f"run={{folder: '{folder}', total_images: {images}}}",
            f"data={{shards: '{shards.uri}', num_classes: 10, window_megabytes: 1}}",
            f"storage={{endpoint_url: '{endpoint_url}'}}",
            f"checkpoints={{save_every_images: {SAVE_EVERY}}}",
            f"reporting={{log_every_images: {LOG_EVERY}, grid_every_images: {GRID_EVERY}, "
            "sample_keys: true}",
        )
        self._command = [COMMAND, "train", str(job)]
        self._command += [part for change in changes for part in ("--set", change)]

    def begin(self, *changes: str) -> subprocess.Popen:
        """The command in a process."""
        options = [part for change in changes for part in ("--set", change)]
        with self._log.open("a") as log:
            return subprocess.Popen([*self._command, *options], stdout=log, stderr=log)

    def told(self) -> str:
        """The end of what it printed."""
        return self._log.read_text()[-5000:]


@pytest.fixture(scope="module")
def shards(s3_server) -> Location:
    """The digits on the server."""
    uri = f"s3://{s3_server.bucket}/bad-nights/shards"
    prepare(digits(uri, Storage(endpoint_url=s3_server.endpoint_url)))
    return locate(uri, s3_server.endpoint_url)


@pytest.fixture(scope="module")
def undisturbed(s3_server, shards, tmp_path_factory) -> Callable[[Path, int], Location]:
    """Finds the folder of a job's run without any fault, after so many images."""
    done: dict[int, Location] = {}

    def find(job: Path, images: int) -> Location:
        if images not in done:
            folder = str(tmp_path_factory.mktemp("undisturbed"))
            run = Run(job, folder, shards, s3_server.endpoint_url, images)
            assert run.begin().wait(LONGEST_SECONDS) == 0, run.told()
            done[images] = locate(folder)
        return done[images]

    return find


@pytest.fixture
def behind(chaos, s3_server, shards, job_file: Path) -> Callable[[int], tuple[Run, Location]]:
    """Makes a run behind the proxy; the place is its folder, without the proxy."""

    def make(images: int) -> tuple[Run, Location]:
        uri = f"s3://{s3_server.bucket}/bad-nights/run-{time.time_ns()}"
        run = Run(job_file, uri, shards, chaos.endpoint_url, images)
        return run, locate(uri, s3_server.endpoint_url, retry_seconds=60.0)

    return make


def wait_for(images: int, place: Location, process: subprocess.Popen, run: Run) -> None:
    """Until there is a checkpoint of so many images."""
    until = time.monotonic() + LONGEST_SECONDS
    while (found := newest(place)) is None or read_state(found).images < images:
        assert process.poll() is None and time.monotonic() < until, run.told()
        time.sleep(0.2)


def tensor_hashes(run: Location) -> dict[str, str]:
    """The newest checkpoint's files by hash; the state holds paths, which differ."""
    checkpoint = newest(run)
    assert checkpoint is not None
    records = read_manifest(checkpoint) or ()
    return {record.name: record.sha256 for record in records if record.name != STATE}


def figures(run: Location) -> list[dict[str, Any]]:
    """What each interval's rows say of the training itself, in the order of the file."""
    names = ("images", "workers", "d_loss", "g_loss", "r1", "r2", "consistency")
    rows = (row for row in read_rows(run) if row["kind"] == "train")
    return [{name: row[name] for name in names} for row in rows]


def grids(run: Location) -> dict[str, bytes]:
    """The pictures by name."""
    return {name: (run / "grids" / name).read() for name in (run / "grids").sizes()}


def check_same(place: Location, expected: Location, epoch_images: int, images: int) -> None:
    """Weights, figures, pictures and samples are those of the undisturbed run."""
    assert tensor_hashes(place) == tensor_hashes(expected)
    assert [row["images"] for row in figures(place)] == [*range(LOG_EVERY, images + 1, LOG_EVERY)]
    assert figures(place) == figures(expected)
    assert len(grids(place)) == images // GRID_EVERY + 1 and grids(place) == grids(expected)
    assert (place / "tensorboard").sizes()
    assert b'"finished"' in (place / OUTCOME).read()
    trained, known = (trained_on(each, starts_of(read_ledger(each))) for each in (place, expected))
    assert trained == known and len(trained.keys) == images
    assert not repeated(trained, epoch_images)


def check_cost(place: Location, paid_seconds: float) -> None:
    """Each worker's ledger is complete, and together they are no more than what was paid for."""
    rows = read_ledger(place)
    groups = groups_of(rows)
    for row in rows:
        assert sum(row.seconds.values()) == pytest.approx(row.at - row.began, abs=0.01)
    for group in groups:
        assert group.workers == WORKERS and all(group.rows)
    assert {rank[-1].outcome for rank in groups[-1].rows} == {"finished"}
    spans = WORKERS * sum(group.ended - group.began for group in groups)
    assert spans - 1 < summarise(rows).total < WORKERS * paid_seconds


def give_up(run: Run, place: Location, chaos, fault: str) -> None:
    """Trains until the storage goes away for longer than the run's patience."""
    process = run.begin("storage.retry_seconds=20")
    wait_for(SAVE_EVERY, place, process, run)
    chaos.begin(fault)
    assert process.wait(LONGEST_SECONDS) == 75, run.told()
    assert "storage failed at s3://" in run.told() and "Traceback" not in run.told()
    chaos.end()


@pytest.mark.parametrize(
    ("seed", "images", "night"),
    [
        (1, 1024, SHORT),
        *(pytest.param(seed, 12800, LONG, marks=pytest.mark.long) for seed in (2, 3)),
    ],
)
def test_a_run_through_a_bad_night_is_the_undisturbed_one(
    seed, images, night, chaos, behind, undisturbed, shards, job_file
) -> None:
    expected = undisturbed(job_file, images)
    run, place = behind(images)
    began = time.time()
    give_up(run, place, chaos, "killed")
    for kind, fault in product(KINDS, ("503", "cut request", "cut answer", "gone")):
        if kind != "restore":
            chaos.aim(kind, fault)
    with chaos.bad_night(seed=seed, **night):
        process = run.begin()
        wait_for(images // 2, place, process, run)
        process.kill()
        process.wait()
        for fault in ("500", "cut answer", "gone"):
            chaos.aim("restore", fault, 2)
        assert run.begin().wait(LONGEST_SECONDS) == 0, run.told()
    hits = chaos.hits()
    print(sorted(hits.items()))
    assert {kind for kind, _ in hits} >= set(KINDS) and not chaos.left()
    assert "Traceback" not in run.told()
    check_same(place, expected, sum(shard.count for shard in read_index(shards).shards), images)
    check_cost(place, time.time() - began)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["gone", "500", "silent"])
def test_a_server_that_does_not_come_back_ends_the_run_until_it_does(
    fault, chaos, behind, undisturbed, shards, job_file
) -> None:
    images = 1024
    expected = undisturbed(job_file, images)
    run, place = behind(images)
    began = time.time()
    give_up(run, place, chaos, fault)
    assert run.begin().wait(LONGEST_SECONDS) == 0, run.told()
    check_same(place, expected, sum(shard.count for shard in read_index(shards).shards), images)
    check_cost(place, time.time() - began)
