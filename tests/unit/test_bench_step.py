"""What a step's benchmark makes of its times: parts, medians, ratios, shares of the peak."""

import io
import itertools
import json
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from cat_ray.cli import app
from cat_ray.operations.gpus import find_gpu
from cat_ray.operations.step_comparison import (
    PLAIN,
    REFERENCE,
    Steps,
    ours,
    step_table,
    to_json,
)
from cat_ray.operations.step_times import COMMUNICATION, REST, StepTimes, by_row
from cat_ray.training.parts import measured, part

CPU = torch.device("cpu")
# Operations a second.
PEAK = 100.0


def times(
    seconds: float, parts: dict[str, float] | None = None, device: str = "cpu", peak: float = PEAK
) -> StepTimes:
    return StepTimes(seconds, parts or {"G forward": seconds}, 1000, device, peak)


@pytest.fixture
def steps() -> Steps:
    return Steps(
        ways={
            ours(1): [times(s) for s in (2.2, 2.1, 9.0)],
            ours(2): [times(s) for s in (1.0, 5.0, 1.05)],
            PLAIN: [times(2.0), times(1.9), times(2.5, peak=PEAK / 2)],
            REFERENCE: [times(2.6), times(2.6), times(2.6)],
        },
        workers=(1, 2),
        batch_size=4,
        operations=50.0,
    )


@pytest.fixture
def clock(monkeypatch) -> None:
    """Each look at it is a second after the last one."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)


def test_a_part_is_timed_only_while_somebody_measures(clock):
    @part("outer")
    def outer() -> None:
        with part("inner"):
            pass

    outer()
    with measured(CPU) as found:
        outer()
        outer()
    # A second at each border; the innermost part has it.
    assert found.seconds == {(): 2, ("outer",): 4, ("outer", "inner"): 2}
    outer()
    assert sum(found.seconds.values()) == 8


def test_a_part_that_raises_ends(clock):
    with measured(CPU) as found:
        with pytest.raises(KeyError), part("broken"):
            raise KeyError
        with part("next"):
            pass
    assert found.seconds == {(): 2, ("broken",): 1, ("next",): 1}


def test_rows_are_named_by_their_part_and_communication_is_one_of_them():
    seconds = {
        (): 1.0,
        ("draws",): 2.0,
        ("D step",): 3.0,
        ("D step", "backward"): 4.0,
        ("D step", "backward", COMMUNICATION): 5.0,
        ("D step", "optimiser"): 6.0,
        ("D step", "optimiser", COMMUNICATION): 7.0,
    }
    rows = by_row(seconds)
    assert list(rows.items()) == [
        ("draws", 2.0),
        ("D step: rest", 3.0),
        ("D step: backward", 4.0),
        (COMMUNICATION, 12.0),
        ("D step: optimiser", 6.0),
        (REST, 1.0),
    ]
    assert sum(rows.values()) == sum(seconds.values())


def test_ratios_are_of_medians(steps):
    assert steps.seconds(ours(1)) == 2.2
    assert steps.images_per_second(ours(1)) == pytest.approx(4 / 2.2)
    assert steps.ratios() == pytest.approx(
        {
            f"step of {ours(1)} over {PLAIN}": 1.1,
            f"step of {REFERENCE} over {PLAIN}": 1.3,
            f"images/s of {ours(2)} over {ours(1)}": 2.2 / 1.05,
        }
    )


def test_the_share_of_the_peak_is_of_all_devices(steps):
    assert steps.peak == PEAK
    assert steps.share_of_peak(PLAIN) == pytest.approx(50 / 2.0 / PEAK)
    assert steps.share_of_peak(ours(2)) == pytest.approx(50 / 1.05 / (2 * PEAK))


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", find_gpu("H100").peak_teraflops * 1e12),
        ("NVIDIA A100-SXM4-80GB", find_gpu("A100").peak_teraflops * 1e12),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_the_table(device, peak):
    ways = {name: [times(1.0, device=device, peak=0.0)] for name in (ours(1), PLAIN, REFERENCE)}
    steps = Steps(ways, (1,), 4, 1e12)
    assert steps.peak == peak
    assert steps.share_of_peak(PLAIN) == (None if peak is None else 1e12 / peak)
    assert ("unknown" in shown(steps)) == (peak is None)


def shown(steps: Steps) -> str:
    page = io.StringIO()
    Console(file=page, width=200).print(step_table(steps))
    return page.getvalue()


def test_the_table_has_every_part_of_every_way(steps):
    mixed = Steps(
        {
            ours(1): [times(1.0, {"draws": 0.1, COMMUNICATION: 0.2})],
            PLAIN: [times(1.0, {"draws": 0.3, REST: 0.4})],
            REFERENCE: [times(1.0, {"draws": 0.5})],
        },
        (1,),
        4,
        50.0,
    )
    lines = [line.split("│")[1:-1] for line in shown(mixed).splitlines() if line.startswith("│")]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    assert rows["draws"] == ["100.0 ms", "300.0 ms", "500.0 ms"]
    assert rows[COMMUNICATION] == ["200.0 ms", "", ""]
    assert rows[REST] == ["", "400.0 ms", ""]
    assert rows["sum of parts"] == ["300 ms", "700 ms", "500 ms"]
    assert f"step of {ours(1)} over {PLAIN}: 1.10" in shown(steps)


def test_scripts_get_every_repetition_the_medians_and_the_ratios(steps):
    found = json.loads(to_json(steps))
    assert [each["seconds"] for each in found["ways"][ours(1)]] == [2.2, 2.1, 9.0]
    assert found["medians"][ours(1)]["seconds"] == 2.2
    assert found["ratios"] == steps.ratios()


def test_plain_pytorch_is_measured_without_ray_and_deepspeed():
    program = (
        "import sys; import cat_ray.operations.plain_training as plain; "
        "print(plain.__name__, *{'ray', 'deepspeed'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split() == ["cat_ray.operations.plain_training"], result.stderr


@pytest.mark.parametrize(("workers", "told"), [("1,x", "as in 1,2"), ("1,5", "lanes is 4")])
def test_numbers_of_workers_that_cannot_be_are_refused_in_a_line(job_file, workers, told):
    result = CliRunner().invoke(app, ["bench", "step", str(job_file), "--workers", workers])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("cat-ray: --workers")
    assert told in line
