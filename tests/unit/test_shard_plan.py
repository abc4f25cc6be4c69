"""What goes into which shard: each sample once, the same for the same seed, mixed."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.data import shard_plan as module
from cat_ray.data.shard_plan import ShardPlan, plan_shards
from cat_ray.data.sources import Unit

some = settings(max_examples=80, deadline=None, derandomize=True)
Sample = tuple[str, int]

# Each sample by its unit and its place there.
GOLDEN = [["22", "10", "21", "20"], ["01", "23", "00", "02"], ["30", "31"]]


def units_of(counts: list[int]) -> list[Unit]:
    return [Unit(f"file-{n}", 0, 100, count) for n, count in enumerate(counts)]


counts = st.one_of(st.lists(st.integers(1, 12), max_size=30), st.lists(st.just(1), max_size=60))
sizes = st.integers(1, 25)
seeds = st.integers(0, 5)


def dealt(plan: ShardPlan) -> list[Sample]:
    """A shard's samples as they come from its groups, before they are put in order."""
    return [
        (take.unit.file, place)
        for group in plan.groups
        for take in group
        for place in range(take.first, take.stop)
    ]


def written(plan: ShardPlan) -> list[Sample]:
    """A shard's samples in the order in which they are written."""
    found = []
    for number, group in enumerate(plan.groups):
        members = [(t.unit.file, place) for t in group for place in range(t.first, t.stop)]
        found += [members[place] for place in plan.order(number)]
    return found


@some
@given(counts, sizes, seeds)
def test_each_sample_goes_into_one_shard_once(of, size, seed):
    plans = list(plan_shards(units_of(of), size, seed))
    every = Counter((f"file-{n}", place) for n, count in enumerate(of) for place in range(count))
    assert Counter(sample for plan in plans for sample in dealt(plan)) == every
    assert Counter(sample for plan in plans for sample in written(plan)) == every


@some
@given(counts, sizes, seeds)
def test_shards_have_the_size_that_was_asked_for_and_the_last_one_the_rest(of, size, seed):
    found = [len(dealt(plan)) for plan in plan_shards(units_of(of), size, seed)]
    whole, rest = divmod(sum(of), size)
    assert found == [size] * whole + [rest] * bool(rest)


@some
@given(counts, sizes, seeds)
def test_a_plan_is_the_same_each_time_whatever_else_was_drawn(of, size, seed):
    first = list(plan_shards(units_of(of), size, seed))
    orders = [plan.order(group) for plan in first for group in range(len(plan.groups))]
    random.seed(7)
    again = list(plan_shards(units_of(of), size, seed))
    assert again == first
    # An order doesn't depend on what was asked for before it.
    backwards = [
        plan.order(group) for plan in again[::-1] for group in reversed(range(len(plan.groups)))
    ]
    assert backwards[::-1] == orders


def test_another_seed_is_another_order_of_units_and_of_samples():
    for of in ([1] * 50, [10] * 20):
        found = {
            tuple(
                sample for plan in plan_shards(units_of(of), 20, seed) for sample in written(plan)
            )
            for seed in range(4)
        }
        assert len(found) == 4


def test_a_plan_never_changes():
    # An interrupted preparation that went on under another plan would lose and double samples.
    plans = list(plan_shards(units_of([3, 1, 4, 2]), 4, seed=7))
    assert [plan.name for plan in plans] == [f"train-{n:06d}.tar" for n in range(3)]
    assert [[f"{f[-1]}{p}" for f, p in written(plan)] for plan in plans] == GOLDEN


def test_units_of_one_sample_are_written_as_they_are_read():
    for plan in plan_shards(units_of([1] * 30), 8, seed=3):
        assert written(plan) == dealt(plan)


@pytest.mark.parametrize("mixed", [1, 5, 17, 1000])
def test_groups_are_runs_of_takes_of_about_the_size_that_is_mixed(monkeypatch, mixed):
    monkeypatch.setattr(module, "MIXED_IMAGES", mixed)
    for plan in plan_shards(units_of([4] * 40), 50, seed=0):
        sizes = [sum(take.stop - take.first for take in group) for group in plan.groups]
        assert all(sizes)
        # A take is not cut: the next one may begin within it.
        assert all(size < mixed + 4 for size in sizes)
        together = [take for group in plan.groups for take in group]
        assert sum(take.stop - take.first for take in together) == sum(sizes)


def test_samples_that_lay_together_are_mixed_with_those_of_others():
    (plan,) = plan_shards(units_of([100] * 10), 1000, seed=0)
    files = [file for file, _ in written(plan)]
    neighbours = sum(a == b for a, b in pairwise(files))
    # By chance a tenth are of one file; unmixed all but nine would be.
    assert neighbours < 200
    assert len(set(files[:50])) > 5


def test_a_unit_may_go_into_several_shards():
    plans = list(plan_shards(units_of([10]), 4, seed=0))
    takes = [(t.first, t.stop) for plan in plans for group in plan.groups for t in group]
    assert takes == [(0, 4), (4, 8), (8, 10)]


def test_of_nothing_there_is_no_shard():
    assert list(plan_shards([], 10, seed=0)) == []
