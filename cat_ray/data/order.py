"""Which sample is where in the run: a pure function of (seed, epoch, index).

The run's stream is one epoch after another without a gap, cut into batches of fixed size. A batch
is cut into lanes; an epoch's shuffled samples are dealt to the lanes as one contiguous run each, so
that a lane reads few blocks. The place in the stream, in images, is all there is to remember.

Shards are cut into blocks of neighbouring samples, which are read together. An epoch shuffles all
blocks of all shards, and the samples within each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cat_ray.training.randomness import Purpose, random_stream


@dataclass(frozen=True)
class Stream:
    """The endless sequence of training samples of a run.

    Attributes:
        seed: the run's seed.
        counts: samples in each shard.
        block_images: samples of a shard that are read together; the last block may be smaller.
        batch_size: images in a global batch.
        lanes: streams that a batch is cut into; it divides the batch size.
    """

    seed: int
    counts: tuple[int, ...]
    block_images: int
    batch_size: int
    lanes: int

    @property
    def lane_size(self) -> int:
        """Images of a lane in each batch."""
        return self.batch_size // self.lanes

    @property
    def epoch_images(self) -> int:
        """Images in an epoch."""
        return sum(self.counts)


@dataclass(frozen=True)
class Blocks:
    """All blocks of all shards, in the order of the index; a row for each.

    Attributes:
        shard: whose block it is, by its place in the index.
        first: its first sample, by its place in the shard.
        count: its samples.
    """

    shard: np.ndarray
    first: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class Piece:
    """A lane's run of samples from one block, in the order in which they are trained on.

    Attributes:
        lane: whose samples these are.
        start: how many of the lane's samples come before, since the start of the run.
        shard: which shard, by its place in the index.
        members: the samples, by their place in the shard.
    """

    lane: int
    start: int
    shard: int
    members: tuple[int, ...]


def lane_images(stream: Stream, lane: int, images: int) -> int:
    """How many of the first `images` of the stream belong to a lane."""
    batches, rest = divmod(images, stream.batch_size)
    in_last = min(max(rest - lane * stream.lane_size, 0), stream.lane_size)
    return batches * stream.lane_size + in_last


@lru_cache(maxsize=2)
def blocks(stream: Stream) -> Blocks:
    """The blocks that the shards are cut into."""
    counts, size = np.asarray(stream.counts), stream.block_images
    each = -(-counts // size)
    shard = np.repeat(np.arange(len(counts)), each)
    first = (np.arange(len(shard)) - np.repeat(np.cumsum(each) - each, each)) * size
    return Blocks(shard, first, np.minimum(size, counts[shard] - first))


def block_order(stream: Stream, epoch: int) -> np.ndarray:
    """The order in which an epoch goes through the blocks."""
    random = random_stream(stream.seed, Purpose.BLOCK_ORDER, epoch)
    return random.permutation(len(blocks(stream).shard))


def member_order(stream: Stream, epoch: int, block: int) -> list[int]:
    """The order in which an epoch goes through a block's samples, by their place in the shard."""
    random = random_stream(stream.seed, Purpose.SAMPLE_ORDER, epoch, block)
    of = blocks(stream)
    return (of.first[block] + random.permutation(of.count[block])).tolist()


@lru_cache(maxsize=2)
def _shuffled(stream: Stream, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's blocks in its order, and how many of its samples come before each."""
    order = block_order(stream, epoch)
    counts = blocks(stream).count[order]
    return order, np.cumsum(counts) - counts


def lane_pieces(stream: Stream, lane: int, start: int, stop: int) -> Iterator[Piece]:
    """What a lane still has to read between two places in the stream, both in images.

    Blocks of which nothing is due are not mentioned.
    """
    epoch_images, of = stream.epoch_images, blocks(stream)
    position = lane_images(stream, lane, start)
    last = lane_images(stream, lane, stop)
    for epoch in range(start // epoch_images, -(-stop // epoch_images)):
        opens, closes = epoch * epoch_images, (epoch + 1) * epoch_images
        before = [lane_images(stream, other, opens) for other in range(lane + 1)]
        after = [lane_images(stream, other, closes) for other in range(lane + 1)]
        offset = sum(after[:lane]) - sum(before[:lane])
        # The lane's due run within the epoch's shuffled samples.
        begin = offset + max(position, before[lane]) - before[lane]
        end = offset + min(last, after[lane]) - before[lane]
        order, comes_after = _shuffled(stream, epoch)
        place = max(int(np.searchsorted(comes_after, begin, side="right")) - 1, 0)
        while place < len(order) and (at := int(comes_after[place])) < end:
            block = int(order[place])
            first, beyond = max(begin, at), min(end, at + int(of.count[block]))
            if first < beyond:
                members = member_order(stream, epoch, block)[first - at : beyond - at]
                start_in_run = before[lane] + first - offset
                yield Piece(lane, start_in_run, int(of.shard[block]), tuple(members))
            place += 1


def pieces(stream: Stream, lanes: range, start: int, stop: int) -> list[Piece]:
    """What several lanes still have to read, lane after lane."""
    return [piece for lane in lanes for piece in lane_pieces(stream, lane, start, stop)]


def mixing(stream: Stream, batches: int) -> tuple[float, float]:
    """How many blocks, and how many shards, a batch draws on: means over the first batches."""
    blocks_of, shards_of = [], []
    for start in range(0, batches * stream.batch_size, stream.batch_size):
        found = pieces(stream, range(stream.lanes), start, start + stream.batch_size)
        blocks_of.append(len({(p.shard, p.members[0] // stream.block_images) for p in found}))
        shards_of.append(len({p.shard for p in found}))
    return float(np.mean(blocks_of)), float(np.mean(shards_of))
