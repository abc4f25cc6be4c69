"""The samples still due, streamed by Ray Data to each worker in the run's exact order.

Reading and decoding are Ray Data tasks that run wherever the cluster has a CPU to spare. A worker
asks for the pieces of its own lanes, so no shard is read for lanes of others, and one window of the
stream at a time: while it trains on one, the next is read. A window is read as fast as it comes,
because Ray Data's executor, which lives in the worker, spins as long as it is held back.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
import ray.train

from cat_ray.data.decode import BrokenSample, decode_sample
from cat_ray.data.index import Index, Shard
from cat_ray.data.order import Stream, lane_images, pieces
from cat_ray.data.read import read_shard
from cat_ray.errors import BadInput
from cat_ray.storage import Location
from cat_ray.training.lanes import share

DATASET_NAME = "train"
CPUS_PER_READ = 0.5
NODE_ID = "ray.io/node-id"
FIRST_WINDOW_BATCHES = 4


@dataclass(frozen=True)
class Due:
    """What a worker group is to train on: from one place in the stream to another, in images.

    Attributes:
        stream: the run's sample stream.
        start: images seen so far.
        stop: images at the end of the run.
        window: images that are read at a time, over all workers; a multiple of the batch.
        checkpoint: URI of the checkpoint that `start` comes from, None at the very start.
        worker_group: a name that no other worker group of the run has.
        began: unix time at which the start of the group began.
        noise_stream: how often the run was rolled back.
        gone_nodes: nodes that don't answer, though Ray may not know it yet.
        index: the shards.
        folder: where they lie.
        num_classes: class ids must be below this.
    """

    stream: Stream
    start: int
    stop: int
    window: int
    checkpoint: str | None
    worker_group: str
    began: float
    noise_stream: int
    gone_nodes: tuple[str, ...]
    index: Index
    folder: Location
    num_classes: int


@dataclass(frozen=True)
class Batch:
    """A worker's part of a global batch, or of a window of them, lane after lane.

    Attributes:
        images: `[n, channels, resolution, resolution]` uint8.
        labels: `[n]` int64.
        keys: `[n]`, each sample's shard and name in it.
        broken: for each sample "", or a line where it can't be read and a neighbour stands in.
    """

    images: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    broken: np.ndarray


@dataclass(frozen=True)
class RankStream:
    """A worker's lanes of what is due."""

    due: Due
    lanes: range

    def batches(self) -> Iterator[Batch]:
        """The worker's part of every global batch still due, in order.

        Reading begins with the call, before the first batch is asked for.

        Raises:
            BadInput: when iterated; a shard can't be read, or storage fails.
        """
        windows = list(windows_of(self.due))
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="windows")
        first = [reader.submit(self._window, *window) for window in windows[:1]]
        return self._cut_windows(windows, reader, first)

    def _cut_windows(
        self, windows: list[tuple[int, int]], reader: ThreadPoolExecutor, coming: list[Future]
    ) -> Iterator[Batch]:
        with reader:
            for place, (start, stop) in enumerate(windows):
                window = coming.pop().result()
                coming = [reader.submit(self._window, *w) for w in windows[place + 1 : place + 2]]
                steps = (stop - start) // self.due.stream.batch_size
                yield from _cut(window, len(self.lanes), steps)

    def _window(self, start: int, stop: int) -> Batch:
        """Reads the worker's samples between two places in the stream, lane after lane."""
        tasks = [
            {"lane": piece.lane, "start": piece.start, "shard": piece.shard, "members": members}
            for piece in pieces(self.due.stream, self.lanes, start, stop)
            for members in [np.asarray(piece.members)]
        ]
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            read_piece,
            batch_size=1,
            fn_kwargs={"due": self.due},
            num_cpus=CPUS_PER_READ,
            **elsewhere(self.due.gone_nodes),
        )
        dataset.context.enable_progress_bars = False
        blocks: list[dict[str, Any]] = list(dataset.iter_batches(batch_size=None))
        columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        order = np.lexsort((columns["place"], columns["lane"]))
        wanted = sum(
            lane_images(self.due.stream, lane, stop) - lane_images(self.due.stream, lane, start)
            for lane in self.lanes
        )
        assert len(order) == wanted, f"{len(order)} samples came, not {wanted}"
        return Batch(*(columns[name][order] for name in ("image", "label", "key", "broken")))


def _cut(window: Batch, lanes: int, steps: int) -> Iterator[Batch]:
    """A window, lane after lane, as the batches of each step."""
    columns = (window.images, window.labels, window.keys, window.broken)
    by_step = [column.reshape(lanes, steps, -1, *column.shape[1:]) for column in columns]
    for step in range(steps):
        yield Batch(*(column[:, step].reshape(-1, *column.shape[3:]) for column in by_step))


def elsewhere(nodes: Sequence[str]) -> dict[str, dict[str, str]]:
    """Ray's options for tasks and workers that must not run on these nodes."""
    return {"label_selector": {NODE_ID: f"!in({','.join(nodes)})"}} if nodes else {}


def windows_of(due: Due) -> Iterator[tuple[int, int]]:
    """What is due, a window at a time: from where to where in the stream, in images.

    The first windows are small, so that the first step needn't wait for a whole one.
    """
    start, size = due.start, FIRST_WINDOW_BATCHES * due.stream.batch_size
    while start < due.stop:
        stop = min(start + min(size, due.window), due.stop)
        yield start, stop
        start, size = stop, 2 * size


def keep_helpers_here() -> None:
    """Has Ray Data start its helper actors on this node; call it where the driver runs.

    They are one for each cluster, bound to the node where the first data set ran: a worker's, if
    nobody came before. Were that node killed, reads would wait until Ray notices, about 20 seconds.
    """
    dataset = ray.data.range(1)
    dataset.context.enable_progress_bars = False
    dataset.materialize()


class LaneDataConfig(ray.train.DataConfig):
    """Gives each worker of a Ray Train group the stream of its own lanes."""

    def __init__(self) -> None:
        # Nothing is split by Ray: each rank asks for its own pieces.
        super().__init__(datasets_to_split=[])

    def configure(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, datasets: dict[str, Due], world_size: int, **_: Any
    ) -> list[dict[str, RankStream]]:
        """One stream for each rank, by the name of the data set."""
        return [
            {
                name: RankStream(due, share(due.stream.lanes, world_size, rank))
                for name, due in datasets.items()
            }
            for rank in range(world_size)
        ]


def read_piece(task: dict[str, np.ndarray], due: Due) -> dict[str, np.ndarray]:
    """Reads one piece: the columns image, label, key, lane, place, broken, a row for each sample.

    `place` is the sample's among all of the lane since the start of the run.

    A sample that can't be decoded is replaced by the nearest good one of the shard, so that counts
    and order stay as planned, wherever the piece begins.

    Raises:
        BadInput: the shard can't be read, or none of its samples can.
    """
    shard = due.index.shards[int(task["shard"][0])]
    members = [int(member) for member in task["members"][0]]
    samples = read_shard(due.folder, shard)

    def decode(member: int) -> tuple[np.ndarray, int]:
        index = due.index
        return decode_sample(samples[member], index.channels, index.resolution, due.num_classes)

    rows: list[tuple[np.ndarray, int]] = []
    broken: list[str] = []
    for member in members:
        try:
            rows.append(decode(member))
            broken.append("")
        except BrokenSample as error:
            broken.append(f"{shard.name}: {samples[member].key}: {error}")
            rows.append(_stand_in(member, shard, decode))
    return {
        "image": np.stack([image for image, _ in rows]),
        "label": np.asarray([label for _, label in rows], dtype=np.int64),
        "key": np.asarray([f"{shard.name}/{samples[member].key}" for member in members]),
        "lane": np.full(len(members), int(task["lane"][0])),
        "place": int(task["start"][0]) + np.arange(len(members)),
        "broken": np.asarray(broken),
    }


def _stand_in(
    member: int, shard: Shard, decode: Callable[[int], tuple[np.ndarray, int]]
) -> tuple[np.ndarray, int]:
    """The good sample of the shard that is nearest to a broken one."""
    for other in sorted(range(shard.count), key=lambda other: abs(other - member)):
        with contextlib.suppress(BrokenSample):
            return decode(other)
    raise BadInput(f"no sample of shard {shard.name} can be read")
