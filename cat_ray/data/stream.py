"""The samples still due, streamed by Ray Data to each worker in the run's exact order.

Reading and decoding are Ray Data tasks that run wherever the cluster has a CPU to spare. A worker's
data set is the list of pieces of its own lanes, so no shard is read for lanes of others.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
import ray.train
from ray.data import DataIterator

from cat_ray.data.decode import BrokenSample, decode_sample
from cat_ray.data.index import Index
from cat_ray.data.order import Stream, pieces
from cat_ray.data.read import read_shard
from cat_ray.errors import BadInput
from cat_ray.storage import Location
from cat_ray.training.lanes import share

DATASET_NAME = "train"
CPUS_PER_READ = 0.5


@dataclass(frozen=True)
class Due:
    """What a worker group is to train on: from one place in the stream to another, in images.

    Attributes:
        stream: the run's sample stream.
        start: images seen so far.
        stop: images at the end of the run.
        checkpoint: URI of the checkpoint that `start` comes from, None at the very start.
        index: the shards.
        folder: where they lie.
        num_classes: class ids must be below this.
    """

    stream: Stream
    start: int
    stop: int
    checkpoint: str | None
    index: Index
    folder: Location
    num_classes: int


@dataclass(frozen=True)
class Batch:
    """A worker's part of a global batch, lane after lane.

    Attributes:
        images: `[n, channels, resolution, resolution]` uint8.
        labels: `[n]` int64.
        broken: one line for each sample that could not be read and that a neighbour stands in for.
    """

    images: np.ndarray
    labels: np.ndarray
    broken: tuple[str, ...]


@dataclass(frozen=True)
class RankStream:
    """A worker's lanes, what is due, and the iterator that brings the samples."""

    due: Due
    lanes: range
    iterator: DataIterator

    def batches(self) -> Iterator[Batch]:
        """The worker's part of every global batch still due, in order.

        Raises:
            BadInput: the samples end before the run does, or storage fails.
        """
        stream = self.due.stream
        waiting: dict[int, deque[tuple[np.ndarray, int, str]]] = {x: deque() for x in self.lanes}
        blocks = iter(self.iterator.iter_batches(batch_size=None, prefetch_batches=1))
        for start in range(self.due.start, self.due.stop, stream.batch_size):
            while any(len(queue) < stream.lane_size for queue in waiting.values()):
                block: dict[str, Any] | None = next(blocks, None)
                if block is None:
                    raise BadInput(f"the samples ended at image {start} of {self.due.stop}")
                rows = zip(block["image"], block["label"], block["broken"], strict=True)
                for lane, row in zip(block["lane"], rows, strict=True):
                    waiting[int(lane)].append(row)
            part = [queue.popleft() for queue in waiting.values() for _ in range(stream.lane_size)]
            images, labels, broken = zip(*part, strict=True)
            yield Batch(
                np.stack(images),
                np.asarray(labels, dtype=np.int64),
                tuple(str(line) for line in broken if line),
            )


class LaneDataConfig(ray.train.DataConfig):
    """Gives each worker of a Ray Train group the stream of its own lanes."""

    def __init__(self) -> None:
        # Nothing is split by Ray: each rank's data set is built for it below.
        super().__init__(datasets_to_split=[])

    def configure(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, datasets: dict[str, Due], world_size: int, **_: Any
    ) -> list[dict[str, RankStream]]:
        """One stream for each rank, by the name of the data set."""
        return [
            {name: rank_stream(due, world_size, rank) for name, due in datasets.items()}
            for rank in range(world_size)
        ]


def rank_stream(due: Due, world_size: int, rank: int) -> RankStream:
    """The stream of one worker of a group."""
    lanes = share(due.stream.lanes, world_size, rank)
    tasks = [
        {"lane": piece.lane, "shard": piece.shard, "members": np.asarray(piece.members)}
        for piece in pieces(due.stream, lanes, due.start, due.stop)
    ]
    if not tasks:
        return RankStream(due, lanes, ray.data.from_items([]).iterator())
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        read_piece,
        batch_size=1,
        fn_kwargs={"due": due},
        num_cpus=CPUS_PER_READ,
    )
    options = dataset.context.execution_options
    options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return RankStream(due, lanes, dataset.iterator())


def read_piece(task: dict[str, np.ndarray], due: Due) -> dict[str, np.ndarray]:
    """Reads one piece: the columns image, label, lane and broken, a row for each sample in order.

    A sample that can't be decoded is replaced by the nearest good one of the piece, so that counts
    and order stay as planned.

    Raises:
        BadInput: the shard can't be read, or none of the piece's samples can.
    """
    shard = due.index.shards[int(task["shard"][0])]
    members = [int(member) for member in task["members"][0]]
    samples = read_shard(due.folder, shard)
    decoded: list[tuple[np.ndarray, int] | None] = []
    broken: list[str] = []
    for member in members:
        try:
            decoded.append(
                decode_sample(
                    samples[member], due.index.channels, due.index.resolution, due.num_classes
                )
            )
            broken.append("")
        except BrokenSample as error:
            decoded.append(None)
            broken.append(f"{shard.name}: {samples[member].key}: {error}")
    good = [place for place, sample in enumerate(decoded) if sample is not None]
    if not good:
        raise BadInput(f"no sample of shard {shard.name} can be read: {broken[0]}")
    chosen = [decoded[min(good, key=lambda g, at=at: abs(g - at))] for at in range(len(members))]
    return {
        "image": np.stack([sample[0] for sample in chosen if sample]),
        "label": np.asarray([sample[1] for sample in chosen if sample], dtype=np.int64),
        "lane": np.full(len(members), int(task["lane"][0])),
        "broken": np.asarray(broken),
    }
