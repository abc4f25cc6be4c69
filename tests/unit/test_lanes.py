"""How lanes are shared out among workers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_ray.training.lanes import micro_batches, share


@st.composite
def groups(draw) -> tuple[int, int]:
    lanes = draw(st.integers(1, 300))
    return lanes, draw(st.integers(1, lanes))


@given(groups())
def test_every_lane_has_one_worker_and_ranks_follow_lanes(group):
    lanes, world_size = group
    shared = [lane for rank in range(world_size) for lane in share(lanes, world_size, rank)]
    assert shared == list(range(lanes))


@given(groups())
def test_no_worker_is_idle_or_has_two_lanes_more_than_another(group):
    lanes, world_size = group
    sizes = [len(share(lanes, world_size, rank)) for rank in range(world_size)]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("lanes", "world_size", "expected"),
    [
        (4, 1, [range(0, 4)]),
        (4, 2, [range(0, 2), range(2, 4)]),
        (4, 3, [range(0, 1), range(1, 2), range(2, 4)]),
        (4, 4, [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]),
    ],
)
def test_shares_of_small_groups(lanes, world_size, expected):
    assert [share(lanes, world_size, rank) for rank in range(world_size)] == expected


@pytest.mark.parametrize(
    ("lanes", "world_size", "rank"), [(4, 5, 0), (4, 2, 2), (4, 2, -1), (4, 0, 0), (0, 1, 0)]
)
def test_more_workers_than_lanes_and_strange_ranks_are_refused(lanes, world_size, rank):
    with pytest.raises(ValueError, match=f"rank {rank} of {world_size} workers"):
        share(lanes, world_size, rank)


@given(lanes=st.integers(1, 64), most=st.integers(2, 64), data=st.data())
def test_micro_batches_are_as_many_for_all_and_of_one_size_but_for_the_last(
    lanes: int, most: int, data: st.DataObject
) -> None:
    world_size = data.draw(st.integers(1, lanes))
    counts = set()
    for rank in range(world_size):
        parts = micro_batches(lanes, world_size, rank, most)
        assert [lane for part in parts for lane in part] == list(share(lanes, world_size, rank))
        assert all(parts) and all(len(part) <= most for part in parts)
        assert all(len(part) == most for part in parts[:-2])
        counts.add(len(parts))
        assert micro_batches(lanes, world_size, rank, None) == [share(lanes, world_size, rank)]
    assert len(counts) == 1
