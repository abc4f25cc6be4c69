"""Which sample is where in the run: a pure function of (seed, epoch, index).

The run's stream is one epoch after another without a gap, cut into batches of fixed size. A batch
is cut into lanes; an epoch's shuffled samples are dealt to the lanes as one contiguous run each, so
that a lane reads few shards. The place in the stream, in images, is all there is to remember.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cat_ray.training.randomness import Purpose, random_stream


@dataclass(frozen=True)
class Stream:
    """The endless sequence of training samples of a run.

    Attributes:
        seed: the run's seed.
        counts: samples in each shard.
        batch_size: images in a global batch.
        lanes: streams that a batch is cut into; it divides the batch size.
    """

    seed: int
    counts: tuple[int, ...]
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
class Piece:
    """A lane's run of samples from one shard, in the order in which they are trained on.

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


def shard_order(stream: Stream, epoch: int) -> list[int]:
    """The order in which an epoch goes through the shards."""
    random = random_stream(stream.seed, Purpose.SHARD_ORDER, epoch)
    return random.permutation(len(stream.counts)).tolist()


def member_order(stream: Stream, epoch: int, shard: int) -> list[int]:
    """The order in which an epoch goes through a shard's samples."""
    random = random_stream(stream.seed, Purpose.SAMPLE_ORDER, epoch, shard)
    return random.permutation(stream.counts[shard]).tolist()


def lane_pieces(stream: Stream, lane: int, start: int, stop: int) -> Iterator[Piece]:
    """What a lane still has to read between two places in the stream, both in images.

    Shards of which nothing is due are not mentioned.
    """
    epoch_images = stream.epoch_images
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
        at = 0
        for shard in shard_order(stream, epoch):
            first, beyond = max(begin, at), min(end, at + stream.counts[shard])
            if first < beyond:
                members = member_order(stream, epoch, shard)[first - at : beyond - at]
                yield Piece(lane, before[lane] + first - offset, shard, tuple(members))
            at += stream.counts[shard]


def pieces(stream: Stream, lanes: range, start: int, stop: int) -> list[Piece]:
    """What several lanes still have to read, lane after lane."""
    return [piece for lane in lanes for piece in lane_pieces(stream, lane, start, stop)]
