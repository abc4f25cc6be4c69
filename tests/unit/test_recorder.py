"""The figures between two lines, and where the time between them went."""

import itertools
import time

import pytest
import torch
from torch import distributed

from cat_ray.training.recorder import Recorder

OUTPUTS = torch.zeros(3, 4, 1, 8, 8)


@pytest.fixture(autouse=True)
def group(new_port):
    place = f"tcp://127.0.0.1:{new_port()}"
    distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """With a clock by which a second passes at each look."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    return Recorder(torch.device("cpu"), batch_size=8)


def test_figures_are_means_over_the_steps_and_those_of_the_stages_among_them(recorder):
    for loss in (1.0, 3.0):
        recorder.add({"loss": torch.tensor(loss)}, [OUTPUTS + loss])
    values, broken = recorder.collect([])
    assert values["loss"] == 2.0
    assert values["discrepancy_1"] == values["rewrite_2"] == 0.0
    assert broken == []


def test_the_times_on_figures_and_on_agreement_are_shares_of_the_interval(recorder):
    # Began at 0; each step's figures take from one look at the clock to the next.
    recorder.add({"loss": torch.tensor(1.0)}, [OUTPUTS])
    recorder.add({"loss": torch.tensor(1.0)}, [OUTPUTS])
    values, _ = recorder.collect([0.25, 0.75])
    # At 5: two seconds on figures, one on agreement, two steps of 8 images.
    assert values["report_share"] == pytest.approx(2 / 5)
    assert values["agreement_share"] == pytest.approx(1 / 5)
    assert values["images_per_second"] == pytest.approx(16 / 5)


def test_a_line_s_own_time_is_the_next_interval_s(recorder):
    recorder.add({"loss": torch.tensor(1.0)}, [OUTPUTS])
    recorder.collect([])
    # The line was begun at 3 and collected at 4; it is written from 5 to 6.
    with recorder.reporting():
        pass
    recorder.add({"loss": torch.tensor(1.0)}, [OUTPUTS])
    values, _ = recorder.collect([])
    # At 9: a second each on collecting, writing and figures.
    assert values["report_share"] == pytest.approx(3 / 6)


def test_a_pause_is_no_part_of_the_interval(recorder):
    recorder.add({"loss": torch.tensor(1.0)}, [OUTPUTS])
    recorder.pause(2.0)
    values, _ = recorder.collect([])
    assert values["report_share"] == pytest.approx(1 / 1)
