"""When a run goes back: what a bad step is, how many are too many, and what is remembered of it."""

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.config import flatten, parse
from cat_ray.errors import BadInput
from cat_ray.storage import Location, locate
from cat_ray.training.health import (
    ROLL_BACKS,
    Health,
    Limits,
    RollBack,
    add_roll_back,
    after_step,
    judge,
    must_roll_back,
    read_roll_backs,
    roll_back_message,
)

LIMITS = Limits(bad_steps=3, penalty=1e4, won_accuracy=0.999, won_generator_loss=20.0)
# What a healthy quickstart shows.
GOOD = {
    "d_loss": 0.47,
    "g_loss": 3.2,
    "r1": 11.0,
    "r2": 9.0,
    "consistency": 0.1,
    "d_accuracy": 0.79,
    "real_logit": 6.1,
    "fake_logit": 4.4,
    "alignment": 0.5,
    "discriminator_gradient_norm": 4.0,
    "generator_gradient_norm": 12.0,
}
BAD = {**GOOD, "r1": 2e4}
NOT_FINITE = (math.nan, math.inf, -math.inf)
few = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


# One step.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"d_accuracy": 1.0},
        {"g_loss": 400.0},
        {"d_accuracy": 0.9989, "g_loss": 25.0},
        {"d_accuracy": 1.0, "g_loss": 19.99},
        {"r1": 1e4, "r2": 1e4},
        {"d_accuracy": 0.0, "g_loss": 0.0, "r1": 0.0, "r2": 0.0},
        {"real_logit": -300.0, "fake_logit": 1e6, "discriminator_gradient_norm": 1e9},
    ],
    ids=str,
)
def test_a_step_within_the_limits_is_good(changes):
    assert judge(GOOD | changes, LIMITS) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"d_accuracy": 1.0, "g_loss": 23.1},
            "the discriminator has won: it ranks 100.0% of the pairs rightly, and the generator's "
            "loss is 23.1 (limit 20)",
        ),
        (
            {"d_accuracy": 0.999, "g_loss": 20.0},
            "the discriminator has won: it ranks 99.9% of the pairs rightly, and the generator's "
            "loss is 20 (limit 20)",
        ),
        ({"r1": 10001.0}, "the discriminator is too steep: r1 is 1e+04 (limit 10000)"),
        ({"r2": 23456.0}, "the discriminator is too steep: r2 is 2.346e+04 (limit 10000)"),
        (
            {"r1": 2e5, "r2": 3e6},
            "the discriminator is too steep: r1 is 2e+05 and r2 is 3e+06 (limit 10000)",
        ),
        (
            {"d_accuracy": 1.0, "g_loss": 30.0, "r2": 1e5},
            "the discriminator has won: it ranks 100.0% of the pairs rightly, and the generator's "
            "loss is 30 (limit 20); the discriminator is too steep: r2 is 1e+05 (limit 10000)",
        ),
        (
            {"g_loss": math.nan, "r1": math.inf, "real_logit": -math.inf},
            "figures that are not finite: g_loss nan, r1 inf, real_logit -inf",
        ),
    ],
    ids=str,
)
def test_a_bad_step_is_told_with_its_numbers(changes, reason):
    assert judge(GOOD | changes, LIMITS) == reason


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("name", GOOD)
def test_every_figure_that_is_not_finite_makes_a_step_bad_and_is_named(name, value):
    reason = judge({**GOOD, name: value}, LIMITS)
    assert reason == f"figures that are not finite: {name} {value}"


def test_figures_that_a_run_has_not_are_not_missed():
    assert (
        judge({name: GOOD[name] for name in ("d_accuracy", "g_loss", "r1", "r2")}, LIMITS) is None
    )


@few
@given(
    changes=st.dictionaries(st.sampled_from(list(GOOD)), st.floats() | st.sampled_from(NOT_FINITE)),
    limits=st.builds(
        Limits,
        bad_steps=st.just(1),
        penalty=st.floats(0, 1e9),
        won_accuracy=st.floats(0, 1),
        won_generator_loss=st.floats(0, 1e3),
    ),
)
def test_a_good_step_is_finite_and_on_the_right_side_of_every_limit(changes, limits):
    figures = GOOD | changes
    reason = judge(figures, limits)
    won = (
        figures["d_accuracy"] >= limits.won_accuracy
        and figures["g_loss"] >= limits.won_generator_loss
    )
    within = (
        all(-math.inf < value < math.inf for value in figures.values())
        and figures["r1"] <= limits.penalty
        and figures["r2"] <= limits.penalty
        and not won
    )
    assert (reason is None) == within
    assert reason is None or (reason and "\n" not in reason)


# Steps in a row.


@few
@given(good=st.lists(st.booleans(), max_size=12), bad_steps=st.integers(1, 4))
def test_a_run_goes_back_exactly_when_its_last_steps_were_all_bad(good, bad_steps):
    limits = Limits(bad_steps, LIMITS.penalty, LIMITS.won_accuracy, LIMITS.won_generator_loss)
    health = Health()
    for done, is_good in enumerate(good, start=1):
        health = after_step(health, GOOD if is_good else BAD, limits)
        last = good[max(0, done - bad_steps) : done]
        assert must_roll_back(health, limits) == (len(last) == bad_steps and not any(last))


def test_a_new_run_is_healthy_and_a_good_step_makes_up_for_bad_ones():
    assert not must_roll_back(Health(), LIMITS)
    health = after_step(after_step(Health(), BAD, LIMITS), BAD, LIMITS)
    assert health == Health(2, judge(BAD, LIMITS))
    assert after_step(health, GOOD, LIMITS) == Health()


def test_the_reason_is_the_last_steps():
    health = after_step(Health(), BAD, LIMITS)
    health = after_step(health, {**GOOD, "d_loss": math.nan}, LIMITS)
    assert health == Health(2, "figures that are not finite: d_loss nan")


# What the researcher is told.


@pytest.mark.parametrize(
    ("to_images", "place"), [(16_000, "the checkpoint at 16,000 images"), (0, "the beginning")]
)
def test_the_message_says_why_where_to_and_with_which_noise(to_images, place):
    health = Health(5, "figures that are not finite: d_loss nan")
    told, advice = roll_back_message(health, 23_456, to_images, 2).splitlines()
    assert told == (
        f"Rolling back from 23,456 images to {place}: figures that are not finite: d_loss nan "
        "(bad steps in a row: 5). The run goes on with fresh noise, stream 2."
    )
    assert "lower" in advice
    assert "larger" in advice


def test_the_knobs_of_the_message_are_keys_of_a_job(tiny_job):
    keys = flatten(parse(tiny_job, "job"))
    named = re.findall(r"\b[a-z]+(?:\.[a-z_]+)+", roll_back_message(Health(1, "x"), 2, 1, 1))
    assert {"optimisation.generator.learning_rate", "objective.penalty.weight"} < set(named)
    assert set(named) <= keys.keys()


# The record.

roll_backs = st.lists(
    st.builds(RollBack, st.integers(0, 2**62), st.integers(0, 2**62), st.text(max_size=40)),
    max_size=5,
)


def test_a_run_that_never_went_back_draws_the_first_noise(run):
    assert read_roll_backs(run) == ()


@few
@given(added=roll_backs)
def test_what_is_added_is_read_in_its_order(tmp_path_factory, added):
    run = locate(str(tmp_path_factory.mktemp("run")))
    for count, roll_back in enumerate(added):
        assert len(read_roll_backs(run)) == count
        add_roll_back(run, roll_back)
    assert read_roll_backs(run) == tuple(added)


def test_the_record_is_a_plain_list(run):
    add_roll_back(run, RollBack(4096, 4000, "d_loss nan"))
    assert json.loads((run / "rollbacks.json").read()) == [
        {"images": 4096, "to_images": 4000, "reason": "d_loss nan"}
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[",
        b"null",
        b"{}",
        b"\xff\xfe",
        b'["text"]',
        b'[{"images": 1, "to_images": 0}]',
        b'[{"images": "1", "to_images": 0, "reason": "x"}]',
        b'[{"images": 1.5, "to_images": 0, "reason": "x"}]',
        b'[{"images": true, "to_images": 0, "reason": "x"}]',
        b'[{"images": 1, "to_images": 0, "reason": null}]',
    ],
)
def test_a_damaged_record_is_refused_by_name_and_never_overwritten(run, content):
    (run / ROLL_BACKS).write(content)
    for use in (read_roll_backs, lambda run: add_roll_back(run, RollBack(2, 1, "x"))):
        with pytest.raises(BadInput, match=re.escape((run / ROLL_BACKS).uri) + " is damaged"):
            use(run)
    assert (run / ROLL_BACKS).read() == content


def test_a_record_cut_anywhere_is_refused(run):
    add_roll_back(run, RollBack(4096, 4000, "d_loss nan"))
    whole = (run / ROLL_BACKS).read()
    for size in range(len(whole)):
        (run / ROLL_BACKS).write(whole[:size])
        with pytest.raises(BadInput, match="is damaged"):
            read_roll_backs(run)
