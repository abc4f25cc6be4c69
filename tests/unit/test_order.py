"""The plan of a run's samples: each image once, through any cuts and any number of workers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.data.index import Index
from cat_ray.data.order import (
    Piece,
    Stream,
    lane_images,
    lane_pieces,
    member_order,
    pieces,
    shard_order,
)
from cat_ray.data.stream import Batch, Due, RankStream
from cat_ray.storage import locate
from cat_ray.training.lanes import share

some = settings(max_examples=80, deadline=None, derandomize=True)
Sample = tuple[int, int]

# (lane, start, shard, members), from the second batch on; an epoch is 10 images, a batch 4.
GOLDEN = [
    (0, 2, 1, (0, 1, 4)),
    (0, 5, 0, (0,)),
    (0, 6, 2, (0, 1)),
    (1, 2, 2, (0, 1)),
    (1, 4, 1, (3, 0, 1)),
    (1, 7, 0, (2,)),
]


@st.composite
def streams(draw) -> Stream:
    counts = draw(st.lists(st.integers(0, 11), min_size=1, max_size=6).filter(any))
    lanes, lane_size = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    return Stream(draw(st.integers(0, 9)), tuple(counts), lanes * lane_size, lanes)


@st.composite
def places(draw, stream: Stream) -> tuple[int, int]:
    """Two places in the first three epochs or so, at batches' ends."""
    batches = 3 * stream.epoch_images // stream.batch_size + 1
    start = draw(st.integers(0, batches - 1))
    stop = draw(st.integers(start + 1, batches))
    return start * stream.batch_size, stop * stream.batch_size


def flat(run: Sequence[Piece]) -> list[Sample]:
    return [(piece.shard, member) for piece in run for member in piece.members]


def batches(stream: Stream, lanes: range, start: int, stop: int) -> list[list[Sample]]:
    """A worker's part of each batch, gathered from its pieces as they come."""
    waiting: dict[int, list[Sample]] = {lane: [] for lane in lanes}
    for piece in pieces(stream, lanes, start, stop):
        waiting[piece.lane].extend(flat([piece]))
    size = stream.lane_size
    steps = (stop - start) // stream.batch_size
    assert all(len(samples) == steps * size for samples in waiting.values())
    return [
        [s for samples in waiting.values() for s in samples[step * size : (step + 1) * size]]
        for step in range(steps)
    ]


def global_batches(stream: Stream, world_size: int, start: int, stop: int) -> list[list[Sample]]:
    ranks = [
        batches(stream, share(stream.lanes, world_size, rank), start, stop)
        for rank in range(world_size)
    ]
    return [[s for part in parts for s in part] for parts in zip(*ranks, strict=True)]


class Planned(RankStream):
    """A worker's stream in which an image is only its place: nothing is read."""

    def _window(self, start: int, stop: int) -> Batch:
        planned = np.asarray(flat(pieces(self.due.stream, self.lanes, start, stop)))
        shards, members = planned.T
        keys = np.asarray([f"{shard}/{member}" for shard, member in planned])
        return Batch(planned[:, :, None, None], members, keys, shards.astype(str))


def dealt_by_hand(stream: Stream, epochs: int) -> list[list[Sample]]:
    """The plan image by image: shuffle an epoch, count each lane's share, deal one run to each."""
    lanes: list[list[Sample]] = [[] for _ in range(stream.lanes)]
    for epoch in range(epochs):
        shuffled = [
            (shard, member)
            for shard in shard_order(stream, epoch)
            for member in member_order(stream, epoch, shard)
        ]
        first = epoch * stream.epoch_images
        due = Counter(
            image % stream.batch_size // stream.lane_size
            for image in range(first, first + stream.epoch_images)
        )
        for lane in range(stream.lanes):
            lanes[lane] += shuffled[: due[lane]]
            del shuffled[: due[lane]]
    return lanes


@some
@given(streams(), st.integers(0, 4))
def test_an_epoch_holds_each_image_once(stream, epoch):
    first = epoch * stream.epoch_images
    met = Counter(flat(pieces(stream, range(stream.lanes), first, first + stream.epoch_images)))
    every = [(shard, m) for shard, count in enumerate(stream.counts) for m in range(count)]
    assert met == Counter(every)


@some
@given(st.data())
def test_cuts_and_resizes_change_no_batch_and_repeat_and_lose_no_image(data):
    stream = data.draw(streams())
    epochs = stream.batch_size // gcd(stream.batch_size, stream.epoch_images)
    stop = epochs * stream.epoch_images
    steps = stop // stream.batch_size
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, steps - 1)), max_size=4)))
    trained: list[list[Sample]] = []
    for begin, end in zip([0, *cuts], [*cuts, steps], strict=True):
        world_size = data.draw(st.integers(1, stream.lanes))
        # Each session plans to the run's end and is interrupted on the way.
        planned = global_batches(stream, world_size, begin * stream.batch_size, stop)
        trained += planned[: end - begin]
    assert trained == global_batches(stream, 1, 0, stop)
    seen: Counter[Sample] = Counter()
    for batch in trained:
        seen.update(batch)
        # At no moment has an image been seen twice more often than another.
        assert max(seen.values()) - min(seen.values()) <= 1
        if len(seen) < stream.epoch_images:
            assert max(seen.values()) == 1
    assert set(seen.values()) == {epochs}
    assert len(seen) == stream.epoch_images


@some
@given(st.data())
def test_windows_of_any_size_change_no_batch(data):
    stream = data.draw(streams())
    start, stop = data.draw(places(stream))
    window = stream.batch_size * data.draw(st.integers(1, 5))
    world_size = data.draw(st.integers(1, stream.lanes))
    lanes = share(stream.lanes, world_size, data.draw(st.integers(0, world_size - 1)))
    due = Due(
        stream=stream,
        start=start,
        stop=stop,
        window=window,
        checkpoint=None,
        worker_group="3f9a1c",
        began=0.0,
        noise_stream=0,
        gone_nodes=(),
        index=Index(1, 1, (), "", ()),
        folder=locate("nowhere"),
        num_classes=1,
    )
    found = list(Planned(due, lanes).batches())
    expected = batches(stream, lanes, start, stop)
    assert [list(map(tuple, batch.images[..., 0, 0].tolist())) for batch in found] == expected
    assert [batch.labels.tolist() for batch in found] == [[m for _, m in b] for b in expected]
    keys = [[f"{shard}/{member}" for shard, member in batch] for batch in expected]
    assert [batch.keys.tolist() for batch in found] == keys
    assert [batch.broken.tolist() for batch in found] == [[str(n) for n, _ in b] for b in expected]


@some
@given(streams())
def test_the_plan_is_the_one_dealt_by_hand(stream):
    stop = 3 * stream.epoch_images
    for lane, by_hand in enumerate(dealt_by_hand(stream, 3)):
        assert flat(list(lane_pieces(stream, lane, 0, stop))) == by_hand


@some
@given(st.data())
def test_what_is_due_is_the_undisturbed_plan_with_its_head_cut_off(data):
    stream = data.draw(streams())
    start, stop = data.draw(places(stream))
    for lane in range(stream.lanes):
        done = lane_images(stream, lane, start)
        expected = []
        for piece in lane_pieces(stream, lane, 0, stop):
            gone = max(done - piece.start, 0)
            if gone < len(piece.members):
                rest = piece.members[gone:]
                expected.append(replace(piece, start=piece.start + gone, members=rest))
        assert list(lane_pieces(stream, lane, start, stop)) == expected


@some
@given(st.data())
def test_a_lanes_pieces_follow_each_other_without_a_gap(data):
    stream = data.draw(streams())
    start, stop = data.draw(places(stream))
    for lane in range(stream.lanes):
        position = lane_images(stream, lane, start)
        for piece in lane_pieces(stream, lane, start, stop):
            assert (piece.lane, piece.start) == (lane, position)
            assert piece.members
            position += len(piece.members)
        assert position == lane_images(stream, lane, stop)


@some
@given(streams(), st.integers(0, 500))
def test_the_lanes_images_add_up(stream, images):
    shares = [lane_images(stream, lane, images) for lane in range(stream.lanes)]
    assert sum(shares) == images
    assert max(shares) - min(shares) <= stream.lane_size
    assert shares == sorted(shares, reverse=True)


@some
@given(st.data())
def test_a_workers_pieces_come_lane_after_lane(data):
    stream = data.draw(streams())
    start, stop = data.draw(places(stream))
    first = data.draw(st.integers(0, stream.lanes - 1))
    lanes = range(first, data.draw(st.integers(first + 1, stream.lanes)))
    due = pieces(stream, lanes, start, stop)
    assert due == [piece for lane in lanes for piece in lane_pieces(stream, lane, start, stop)]
    assert {piece.lane for piece in due} == set(lanes)


def test_shards_that_are_consumed_are_not_mentioned():
    stream = Stream(seed=0, counts=(4, 4, 4, 4), batch_size=4, lanes=1)
    order = shard_order(stream, 0)
    for consumed in range(5):
        due = pieces(stream, range(1), 4 * consumed, 16)
        assert [piece.shard for piece in due] == order[consumed:]


def test_a_worker_is_not_told_of_shards_that_only_others_read():
    stream = Stream(seed=0, counts=(8,) * 8, batch_size=8, lanes=8)
    for lane in range(8):
        assert len({piece.shard for piece in lane_pieces(stream, lane, 0, 64)}) == 1


def test_epochs_seeds_and_shards_are_shuffled_each_in_their_own_way():
    stream = Stream(seed=0, counts=(30,) * 20, batch_size=4, lanes=2)
    variants = [(replace(stream, seed=seed), epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(shard_order(s, epoch)) for s, epoch in variants}) == 9
    orders = {tuple(member_order(s, epoch, shard)) for s, epoch in variants for shard in range(3)}
    assert len(orders) == 27
    assert tuple(range(30)) not in orders


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"lanes": 1}])
def test_an_epochs_shuffle_does_not_depend_on_how_a_batch_is_cut(change):
    stream = Stream(seed=3, counts=(5, 9, 2), batch_size=4, lanes=2)
    other = replace(stream, **change)
    assert shard_order(stream, 1) == shard_order(other, 1)
    assert [member_order(stream, 1, shard) for shard in range(3)] == [
        member_order(other, 1, shard) for shard in range(3)
    ]


def test_a_plan_never_changes():
    # A run that went on under another plan would see some images twice and others never.
    due = pieces(Stream(seed=7, counts=(3, 5, 2), batch_size=4, lanes=2), range(2), 4, 16)
    assert [(p.lane, p.start, p.shard, p.members) for p in due] == GOLDEN
