"""The plan of a run's samples: each image once, through any cuts and any number of workers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.data.index import Index, Shard
from cat_ray.data.order import (
    Piece,
    Stream,
    block_order,
    blocks,
    lane_images,
    lane_pieces,
    member_order,
    mixing,
    pieces,
)
from cat_ray.data.read import Batch, Reading
from cat_ray.data.stream import Due, RankStream
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
    block = draw(st.integers(1, 12))
    return Stream(draw(st.integers(0, 9)), tuple(counts), block, lanes * lane_size, lanes)


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

    @property
    def _extents(self) -> dict[str, np.ndarray]:
        # Each sample is as many bytes long as its shard's place and one.
        return {
            shard.name: np.arange(shard.count + 1) * (place + 1)
            for place, shard in enumerate(self.due.index.shards)
        }

    def _window(self, start: int, stop: int, room: Batch | None = None) -> Batch:
        wanted = (stop - start) // self.due.stream.lanes * len(self.lanes)
        if room is None or len(room.labels) < wanted:
            room = Batch.empty(self.due.reading, wanted)
        window = room.rows(0, wanted)
        unfilled = np.ones(wanted, bool)
        for piece in pieces(self.due.stream, self.lanes, start, stop):
            row = self._row(piece, start)
            shard, size = self.due.index.shards[piece.shard], self.due.stream.block_images
            assert (row["shard"], row["first"] % size) == (shard.name, 0)
            assert row["count"] == min(size, shard.count - row["first"])
            assert row["first"] <= min(piece.members)
            assert max(piece.members) < row["first"] + row["count"]
            assert row["begin"] == row["first"] * (piece.shard + 1)
            assert row["end"] == (row["first"] + row["count"]) * (piece.shard + 1)
            slots, members = row["slots"], np.asarray(piece.members)
            assert unfilled[slots].all()
            unfilled[slots] = False
            window.content[slots, 0, 0] = np.stack([np.full(len(members), piece.shard), members], 1)
            window.labels[slots] = members
            window.keys[slots] = [f"{piece.shard}/{member}" for member in members]
            window.broken[slots] = str(piece.shard)
        assert not unfilled.any()
        return window


def dealt_by_hand(stream: Stream, epochs: int) -> list[list[Sample]]:
    """The plan image by image: shuffle an epoch, count each lane's share, deal one run to each."""
    lanes: list[list[Sample]] = [[] for _ in range(stream.lanes)]
    for epoch in range(epochs):
        shuffled = [
            (shard, member)
            for block in block_order(stream, epoch)
            for shard in [int(blocks(stream).shard[block])]
            for member in member_order(stream, epoch, block)
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
    world_size = data.draw(st.integers(1, stream.lanes))
    lanes = share(stream.lanes, world_size, data.draw(st.integers(0, world_size - 1)))
    reading = Reading(locate("nowhere"), "images", 1, 2, crop=False, num_classes=1)
    step_bytes = len(lanes) * stream.lane_size * reading.sample_bytes()
    shards = tuple(
        Shard(f"{n}.tar", count, 1024 * count, "") for n, count in enumerate(stream.counts)
    )
    due = Due(
        stream=stream,
        start=start,
        stop=stop,
        window_bytes=data.draw(st.integers(1, 6 * step_bytes)),
        checkpoint=None,
        worker_group="3f9a1c",
        began=0.0,
        noise_stream=0,
        gone_nodes=(),
        index=Index("images", 1, 2, (), "", shards, ""),
        reading=reading,
    )
    expected = batches(stream, lanes, start, stop)
    # A batch is looked at before the next one is asked for: its memory is used again.
    for batch, samples in zip(Planned(due, lanes).batches(), expected, strict=True):
        assert list(map(tuple, batch.content[:, 0, 0].tolist())) == samples
        assert batch.labels.tolist() == [member for _, member in samples]
        assert batch.keys.tolist() == [f"{shard}/{member}" for shard, member in samples]
        assert batch.broken.tolist() == [str(shard) for shard, _ in samples]


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
    stream = Stream(seed=0, counts=(4, 4, 4, 4), block_images=4, batch_size=4, lanes=1)
    order = block_order(stream, 0).tolist()
    for consumed in range(5):
        due = pieces(stream, range(1), 4 * consumed, 16)
        assert [piece.shard for piece in due] == order[consumed:]


def test_a_worker_is_not_told_of_shards_that_only_others_read():
    stream = Stream(seed=0, counts=(8,) * 8, block_images=8, batch_size=8, lanes=8)
    for lane in range(8):
        assert len({piece.shard for piece in lane_pieces(stream, lane, 0, 64)}) == 1


def test_epochs_seeds_and_shards_are_shuffled_each_in_their_own_way():
    stream = Stream(seed=0, counts=(30,) * 20, block_images=30, batch_size=4, lanes=2)
    variants = [(replace(stream, seed=seed), epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(block_order(s, epoch)) for s, epoch in variants}) == 9
    orders = {tuple(member_order(s, epoch, shard)) for s, epoch in variants for shard in range(3)}
    assert len(orders) == 27
    assert tuple(range(30)) not in orders


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"lanes": 1}])
def test_an_epochs_shuffle_does_not_depend_on_how_a_batch_is_cut(change):
    stream = Stream(seed=3, counts=(5, 9, 2), block_images=4, batch_size=4, lanes=2)
    other = replace(stream, **change)
    # Five, nine and two samples are two, three and one blocks.
    assert block_order(stream, 1).tolist() == block_order(other, 1).tolist()
    assert [member_order(stream, 1, block) for block in range(6)] == [
        member_order(other, 1, block) for block in range(6)
    ]


@pytest.mark.parametrize("block_images", [5, 6, 1000])
def test_a_plan_never_changes(block_images):
    # A run that went on under another plan would see some images twice and others never.
    stream = Stream(seed=7, counts=(3, 5, 2), block_images=block_images, batch_size=4, lanes=2)
    due = pieces(stream, range(2), 4, 16)
    assert [(p.lane, p.start, p.shard, p.members) for p in due] == GOLDEN


# Blocks.


def block_samples(stream: Stream, block: int) -> list[Sample]:
    of = blocks(stream)
    first, count = int(of.first[block]), int(of.count[block])
    return [(int(of.shard[block]), first + place) for place in range(count)]


@pytest.mark.parametrize(
    ("counts", "size", "expected"),
    [
        ((1,), 1, [(0, 0, 1)]),
        ((4,), 2, [(0, 0, 2), (0, 2, 2)]),
        ((5,), 2, [(0, 0, 2), (0, 2, 2), (0, 4, 1)]),
        ((3, 5, 2), 5, [(0, 0, 3), (1, 0, 5), (2, 0, 2)]),
        ((3, 0, 4), 3, [(0, 0, 3), (2, 0, 3), (2, 3, 1)]),
        ((2, 3), 1, [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (1, 2, 1)]),
    ],
)
def test_a_shard_is_cut_into_blocks_of_neighbours_the_last_one_smaller(counts, size, expected):
    of = blocks(Stream(seed=0, counts=counts, block_images=size, batch_size=1, lanes=1))
    found = zip(of.shard.tolist(), of.first.tolist(), of.count.tolist(), strict=True)
    assert list(found) == expected


@some
@given(streams())
def test_blocks_cover_each_sample_once_in_the_order_of_the_index(stream):
    samples = [s for b in range(len(blocks(stream).shard)) for s in block_samples(stream, b)]
    assert samples == [
        (shard, m) for shard, count in enumerate(stream.counts) for m in range(count)
    ]
    assert blocks(stream).count.max() <= stream.block_images


@some
@given(streams(), st.integers(0, 4))
def test_an_epoch_goes_through_each_block_once_and_through_each_of_its_samples(stream, epoch):
    order = block_order(stream, epoch).tolist()
    assert sorted(order) == list(range(len(blocks(stream).shard)))
    for block in order:
        members = [member for _, member in block_samples(stream, block)]
        assert sorted(member_order(stream, epoch, block)) == members


@some
@given(streams(), st.integers(0, 3))
def test_no_piece_holds_samples_of_two_blocks(stream, epoch):
    first = epoch * stream.epoch_images
    for piece in pieces(stream, range(stream.lanes), first, first + stream.epoch_images):
        assert len({member // stream.block_images for member in piece.members}) == 1


def test_smaller_blocks_leave_fewer_neighbours_together():
    def together(block_images: int) -> int:
        stream = Stream(0, (64,) * 4, block_images=block_images, batch_size=32, lanes=1)
        first = batches(stream, range(1), 0, 32)[0]
        return max(Counter((shard, member // 8) for shard, member in first).values())

    # A block that is read as a whole fills a batch with its samples, and only with them.
    assert together(8) == 8
    assert together(2) < 8


def test_how_well_a_batch_is_mixed_is_counted() -> None:
    # One lane takes a batch from one block of four; four lanes each have a block of their own.
    alone = Stream(seed=0, counts=(8, 8), block_images=4, batch_size=4, lanes=1)
    assert mixing(alone, 4) == (1.0, 1.0)
    assert mixing(replace(alone, lanes=4), 2)[0] == 4.0
    # One by one: as many blocks as images.
    assert mixing(replace(alone, block_images=1), 4)[0] == 4.0
