"""What workers find out together after each step, in two processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("agreement_steps.py")
WORKERS = 2

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_group: Callable[..., None]) -> Found:
    """What each of the processes found, by rank."""
    folder = tmp_path_factory.mktemp("agreement")
    run_group(SCRIPT, WORKERS, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORKERS)]


def test_all_find_the_same(found: Found) -> None:
    assert found[0] == found[1]


def test_figures_are_added_up_and_come_one_step_late(found: Found) -> None:
    # Rank 0 has 1, 10, 100, ..., rank 1 twice that.
    figures = [step for step, _ in found[0]["steps"]]
    assert figures == [
        [],
        [{"loss": 3.0, "of-step-0": 1.5}],
        [{"loss": 30.0, "of-step-1": 15.0}],
        [{"loss": 300.0, "of-step-2": 150.0}],
    ]


def test_what_anyone_wishes_all_see_in_the_same_step_and_no_other(found: Found) -> None:
    wishes = [held for _, held in found[0]["steps"]]
    assert wishes == [
        [False, False, False],
        [True, True, False],
        [False, False, True],
        [True, False, False],
    ]


def test_settling_brings_the_last_figures_once(found: Found) -> None:
    assert found[0]["before"] == []
    assert found[0]["settled"] == [[{"loss": 3000.0, "of-step-3": 1500.0}], []]


def test_after_settling_figures_come_one_step_late_again(found: Found) -> None:
    assert found[0]["afterwards"] == [
        [[], [False]],
        [[{"loss": 3.0, "of-step-0": 1.5}], [False]],
    ]


def test_a_figure_that_is_not_finite_anywhere_is_so_for_all(found: Found) -> None:
    assert found[0]["broken"].endswith("{'loss': nan}]")


def test_the_first_step_after_settling_needs_neither_figure_nor_wish(found: Found) -> None:
    assert found[0]["nothing"] == [[], []]


def test_settling_brings_the_figures_of_this_step_as_well_as_of_the_one_before(
    found: Found,
) -> None:
    assert found[0]["both"] == [{"loss": 2.0}, {"loss": 30.0, "of-step-1": 15.0}]


def test_what_one_worker_says_all_hear(found: Found) -> None:
    assert found[0]["any"] == [True, False]


def test_values_are_gathered_by_rank(found: Found) -> None:
    assert found[0]["gathered"] == [{"rank": 0, "parts": []}, {"rank": 1, "parts": [1]}]


def test_nobody_passes_a_barrier_before_all_have_come(found: Found) -> None:
    assert found[0]["late"] is True
