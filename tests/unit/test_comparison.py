"""Two runs compared: the same in all that counts, or told apart by what differs."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from cat_ray.checkpoint.layout import GENERATOR, GENERATOR_MOMENTS, State
from cat_ray.config import parse
from cat_ray.errors import RunFailed
from cat_ray.operations.comparison import (
    Compared,
    compare,
    comparison_tables,
    starts_of,
    tolerance,
)
from cat_ray.operations.goodput import BINS, LEDGER, Row
from cat_ray.operations.sample_keys import SAMPLES, SampleKeys
from cat_ray.storage import Location, locate

# A batch is two lanes of one image each.
BATCH, LANES, TOTAL = 2, 2, 8
WHAT = ("images seen", "samples", "random streams", GENERATOR, GENERATOR_MOMENTS)
Groups = dict[str, dict[str, Tensor]]


def row(group: str, began: float, at: float, images: int, rank: int = 0) -> Row:
    return Row(group, rank, 2, began, at, images, dict.fromkeys(BINS, 0.0))


# Worker groups and where they went on from.


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([row("a", 10, 11, 0), row("a", 10, 15, 64)], [("a", 0)]),
        # The names say nothing about the order, nor does the order of the files.
        (
            [row("a", 50, 51, 32), row("a", 50, 55, 64), row("b", 10, 11, 0), row("b", 10, 45, 48)],
            [("b", 0), ("a", 32)],
        ),
        # The workers of a group begin to write at different times.
        (
            [
                *(row("a", 10, at, images, rank=0) for at, images in ((14, 16), (16, 32))),
                *(row("a", 10, at, images, rank=1) for at, images in ((12, 16), (17, 32))),
                row("b", 20, 21, 32),
            ],
            [("a", 16), ("b", 32)],
        ),
        # A group that took no step, and one that went further back.
        (
            [row("c", 30, 31, 16), row("b", 20, 21, 32), row("a", 10, 11, 0), row("a", 10, 15, 48)],
            [("a", 0), ("b", 32), ("c", 16)],
        ),
        # Two rows within one tick of the clock.
        ([row("a", 10, 11, 16), row("a", 10, 11, 0)], [("a", 0)]),
    ],
)
def test_the_groups_in_order_of_time_with_the_images_that_they_went_on_from(rows, expected):
    assert starts_of(rows) == expected
    assert starts_of(rows[::-1]) == expected


# A run beside another.


def groups(**changes: Tensor) -> Groups:
    weights = {"gain": torch.tensor([0.5, 1.0]), "weight": torch.tensor([[1e-3, -100.0, 0.0]])}
    moments = {"gain.first": torch.tensor([1e-9, 0.25])}
    return {GENERATOR: {**weights, **changes}, GENERATOR_MOMENTS: moments}


Make = Callable[..., Location]


@pytest.fixture
def make(tmp_path: Path, save_checkpoint) -> Make:
    """A run's folder as a worker group, or one after another, left it."""

    def run(
        name: str,
        held: Groups | None = None,
        images: int = TOTAL,
        stops: tuple[int, ...] = (TOTAL,),
        keys: str = "abcdefgh",
        noise: float = 0.0,
    ) -> Location:
        place, start = locate(str(tmp_path / name)), 0
        for number, stop in enumerate(stops):
            group = f"{name}{number}"
            line = json.dumps(asdict(row(group, number, number, start)))
            (place / LEDGER / f"{group}-0000.jsonl").write(f"{line}\n".encode())
            record = SampleKeys(place, group, 0)
            for seen in range(start, stop, BATCH):
                drawn = np.full((BATCH, 3), seen + noise, dtype=np.float32)
                record.add(seen, range(LANES), np.asarray(list(keys[seen : seen + BATCH])), drawn)
            start = stop
        if images:
            state = State(images, 0, "digest", "", {})
            save_checkpoint(place, state, groups() if held is None else held)
        return place

    return run


def judged(undisturbed: Location, disturbed: Location, allowed: float | None) -> dict[str, bool]:
    rows = list(compare("a run", undisturbed, disturbed, allowed))
    assert {each.run for each in rows} == {"a run"}
    return {each.what: each.same for each in rows}


def differing(*runs: Location, allowed: float | None = None) -> set[str]:
    return {what for what, same in judged(*runs, allowed).items() if not same}


@pytest.mark.parametrize("allowed", [None, 1e-3])
def test_what_is_compared_is_all_that_counts(make, allowed):
    found = judged(make("one"), make("other", stops=(4, TOTAL)), allowed)
    assert found == dict.fromkeys(WHAT, True)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"images": 6}, {"images seen"}),
        ({"keys": "abdcefgh"}, {"samples"}),
        ({"keys": "abcdefga"}, {"samples"}),
        ({"stops": (6,)}, {"samples", "random streams"}),
        ({"noise": 0.5}, {"random streams"}),
        ({"held": {**groups(gain=torch.tensor([0.5, 1.0 + 1e-6]))}}, {GENERATOR}),
        ({"held": {**groups(), GENERATOR_MOMENTS: {"gain.first": torch.zeros(2)}}}, {WHAT[-1]}),
    ],
)
def test_what_differs_is_named(make, changes, what):
    assert differing(make("one"), make("other", **changes)) == what


def test_samples_that_are_missing_are_told(make):
    one, other = make("one"), make("other")
    written = other / SAMPLES / "other0-0000.jsonl"
    written.write(written.read().split(b"\n", 1)[1])
    rows = {each.what: each for each in compare("a run", one, other, None)}
    assert not rows["samples"].same
    assert rows["samples"].measured == "samples are missing at 0 images"


def test_how_many_samples_are_the_same_is_told(make):
    rows = compare("a run", make("one"), make("other", keys="abdcefgh"), None)
    (measured,) = [each.measured for each in rows if each.what == "samples"]
    assert measured == "6 of 8 the same"


# Tensors.


@pytest.mark.parametrize(
    ("weight", "allowed", "same"),
    [
        ([1e-3, -100.0, 0.0], None, True),
        ([1e-3, -100.0, 1e-9], None, False),
        # Absolute up to 1, relative above.
        ([1e-3 + 9e-4, -100.0, 0.0], 1e-3, True),
        ([1e-3 + 2e-3, -100.0, 0.0], 1e-3, False),
        ([1e-3, -100.09, 0.0], 1e-3, True),
        ([1e-3, -100.2, 0.0], 1e-3, False),
        ([1e-3, 100.0, 0.0], 1e-3, False),
        ([1e-3, -100.0, float("inf")], 1e-3, False),
    ],
)
def test_tensors_are_the_same_bit_for_bit_or_as_nearly_as_allowed(make, weight, allowed, same):
    other = make("other", groups(weight=torch.tensor([weight])))
    assert (GENERATOR not in differing(make("one"), other, allowed=allowed)) is same


@pytest.mark.parametrize(
    "held",
    [
        groups(weight=torch.tensor([[1e-3], [-100.0], [0.0]])),
        groups(other=torch.zeros(1)),
        {**groups(), GENERATOR: {"gain": torch.tensor([0.5, 1.0])}},
    ],
)
def test_other_names_or_shapes_are_another_network(make, held):
    assert GENERATOR in differing(make("one"), make("other", held), allowed=1e9)


def test_a_run_without_a_checkpoint_can_not_be_compared(make):
    with pytest.raises(RunFailed, match="other has no whole checkpoint"):
        judged(make("one"), make("other", images=0), None)


def test_the_tolerance_is_a_small_share_of_the_way_that_a_weight_can_go(tiny_job):
    rates = [f"optimisation.{name}.learning_rate" for name in ("generator", "discriminator")]
    aware = [f"optimisation.{name}.width_aware=false" for name in ("generator", "discriminator")]
    # Four steps of at most 1e-3.
    config = parse(tiny_job, "job.yaml", [f"{rates[0]}=1e-4", f"{rates[1]}=1e-3", *aware])
    assert 0 < tolerance(config) < 0.05 * 4e-3
    # Twice as many steps, and whichever network moves faster by twice as much.
    changes = [f"{rates[0]}=2e-3", f"{rates[1]}=1e-4", *aware, "run.total_images=128"]
    longer = parse(tiny_job, "job.yaml", changes)
    assert tolerance(longer) == pytest.approx(4 * tolerance(config))


def test_the_tables_tell_each_comparison_of_each_run():
    text = io.StringIO()
    rows = [
        Compared("3 kills", "samples", "8 of 8 the same", "all, in order", True),
        Compared("2-1-3-2 workers", "generator", "difference 1.0e-01", "1.0e-05", False),
    ]
    for table in comparison_tables(rows):
        Console(file=text, width=120).print(table)
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in text.getvalue().splitlines()
    ]
    assert ["samples", "8 of 8 the same", "all, in order", "pass"] in lines
    assert ["generator", "difference 1.0e-01", "1.0e-05", "FAIL"] in lines
    assert all(f"{title}" in text.getvalue() for title in ("3 kills", "2-1-3-2 workers"))
