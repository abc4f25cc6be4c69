"""What the benchmark of recoveries makes of its drills."""

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cat_ray.cli import app
from cat_ray.config import Config, dump, parse
from cat_ray.errors import BadInput, RunFailed
from cat_ray.operations import bench_recovery as bench
from cat_ray.operations.bench_recovery import (
    FRESH,
    NAMES,
    RecoverySeconds,
    bench_recovery,
    recovery_table,
    schedule,
    to_json,
)
from cat_ray.operations.drill import Recovery
from cat_ray.operations.goodput import BINS, Row
from cat_ray.storage import locate


@pytest.fixture
def job(tiny_job: str) -> Config:
    return parse(tiny_job, "job.yaml")


@pytest.fixture
def found() -> RecoverySeconds:
    every = {FRESH: [10.0, 12.0, 8.0], NAMES["remove"]: [9.0, 5.0, 5.0], NAMES["add"]: [15.0] * 3}
    return RecoverySeconds(every)


@pytest.mark.parametrize("maximum", [1, 2, 4])
def test_a_node_goes_one_comes_and_one_is_drained_in_a_job_that_lives_through_it(job, maximum):
    workers = {"minimum": 1, "maximum": maximum}
    changed = job.model_copy(update={"workers": job.workers.model_copy(update=workers)})
    config, faults = schedule(changed)
    assert [fault.kind for fault in faults] == list(NAMES)
    assert parse(dump(config), "job.yaml") == config
    # Of the workers that there are then.
    most = max(2, maximum)
    assert (config.workers.minimum, config.workers.maximum) == (1, most)
    assert [fault.rank for fault in faults] == [most - 1, 0, most - 1]
    times = [0, *(fault.images for fault in faults), config.run.total_images]
    assert times == sorted(set(times))
    assert all(at % config.checkpoints.save_every_images == 0 for at in times)


def test_a_job_of_one_lane_is_refused(tiny_job):
    job = parse(tiny_job, "job", ("optimisation.lanes=1", "workers.minimum=1", "workers.maximum=1"))
    with pytest.raises(BadInput, match=r"optimisation\.lanes to 2"):
        schedule(job)


def test_scripts_get_nothing_but_json(found, job_file, monkeypatch):
    def measure(config: Config, repetitions: int) -> RecoverySeconds:
        print("a line of a run", repetitions)
        return found

    monkeypatch.setattr(bench, "bench_recovery", measure)
    command = ["bench", "recovery", str(job_file), "--repetitions", "3", "--json"]
    result = CliRunner().invoke(app, command)
    assert json.loads(result.stdout) == json.loads(to_json(found))
    assert result.stderr == "a line of a run 3\n"


def test_medians_and_ratios_to_a_fresh_start(found):
    assert found.median(FRESH) == 10.0
    assert (found.ratio(NAMES["remove"]), found.ratio(NAMES["add"])) == (0.5, 1.5)
    told = json.loads(to_json(found))
    assert told["seconds"] == found.seconds
    assert told["ratios"] == {NAMES["remove"]: 0.5, NAMES["add"]: 1.5}
    page = io.StringIO()
    Console(file=page, width=120).print(recovery_table(found))
    lines = [line.split("│")[1:-1] for line in page.getvalue().splitlines() if "│" in line]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    assert rows[FRESH] == ["3", "10.0 s", "8.0 s", "12.0 s", ""]
    assert rows[NAMES["remove"]] == ["3", "5.0 s", "5.0 s", "9.0 s", "0.50"]


@pytest.fixture
def run_bench(job, monkeypatch):
    """The benchmark of drills that began at 100 s and ended as the test says."""

    def act(repetitions: int, failure: str = "", noticed: bool = True) -> RecoverySeconds:
        run = locate(schedule(job)[0].run.folder)

        def train(config, faults):
            assert not run.sizes(), "of the run before"
            (run / "trained").write(b"")
            return 100.0, failure

        def came(place, faults):
            seconds = {fault.kind: at for at, fault in enumerate(faults, start=1)}
            return [
                Recovery(f, 200.0, float(seconds[f.kind]) if noticed else None, 0) for f in faults
            ]

        empty = dict.fromkeys(BINS, 0.0)
        rows = [Row("a", 0, 2, 101.0, at, images, empty) for at, images in ((105, 0), (107, 16))]
        monkeypatch.setattr(bench, "train_with_faults", train)
        monkeypatch.setattr(bench, "recoveries", came)
        monkeypatch.setattr(bench, "read_ledger", lambda place: rows)
        return bench_recovery(job, repetitions)

    return act


def test_every_repetition_is_a_run_of_its_own_and_leaves_nothing(run_bench, job):
    found = run_bench(2)
    assert found.seconds == {
        FRESH: [7.0, 7.0],
        NAMES["remove"]: [1.0, 1.0],
        NAMES["add"]: [2.0, 2.0],
        NAMES["drain"]: [3.0, 3.0],
    }
    assert not locate(schedule(job)[0].run.folder).sizes()


@pytest.mark.parametrize("ended", [{"failure": "it broke"}, {"noticed": False}])
def test_a_run_that_failed_or_went_on_is_no_measurement(run_bench, ended):
    with pytest.raises(RunFailed):
        run_bench(1, **ended)


def test_a_folder_that_holds_something_is_left_alone(run_bench, job):
    (locate(schedule(job)[0].run.folder) / "mine").write(b"")
    with pytest.raises(BadInput, match="isn't empty"):
        run_bench(1)
