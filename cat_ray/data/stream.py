"""The samples still due, streamed by Ray Data to each worker in the run's exact order.

Reading and decoding are Ray Data tasks that run wherever the cluster has a CPU to spare. A worker
asks for the pieces of its own lanes, so no shard is read for lanes of others, and one window of the
stream at a time: while it trains on one, the next is read. A window is read as fast as it comes,
because Ray Data's executor, which lives in the worker, spins as long as it is held back.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import ray.data
import ray.train

from cat_ray.config import Config
from cat_ray.data.cache import Cache
from cat_ray.data.index import (
    Extents,
    Index,
    check_fits,
    check_shards,
    read_extents,
    read_index,
)
from cat_ray.data.latent_shape import IMAGE_CHANNELS, REDUCTION
from cat_ray.data.order import Piece, Stream, lane_images, pieces
from cat_ray.data.read import Batch, Reading, part_of
from cat_ray.data.reading_task import COLUMNS, CPUS_PER_READ, PIECES, packed, read_pieces
from cat_ray.storage import Location
from cat_ray.training.lanes import share

DATASET_NAME = "train"
NODE_ID = "ray.io/node-id"
FIRST_WINDOW_BATCHES = 4
WINDOWS_AHEAD, TASKS_PER_WINDOW = 2, 4
BYTES_PER_READ = 48 * 2**20


@dataclass(frozen=True)
class Due:
    """What a worker group is to train on: from one place in the stream to another, in images.

    Attributes:
        stream: the run's sample stream.
        start: images seen so far.
        stop: images at the end of the run.
        window_bytes: of the samples that a worker reads at a time.
        checkpoint: URI of the checkpoint that `start` comes from, None at the very start.
        worker_group: a name that no other worker group of the run has.
        began: unix time at which the start of the group began.
        noise_stream: how often the run was rolled back.
        gone_nodes: nodes that don't answer, though Ray may not know it yet.
        index: the shards.
        reading: how they are read.
    """

    stream: Stream
    start: int
    stop: int
    window_bytes: int
    checkpoint: str | None
    worker_group: str
    began: float
    noise_stream: int
    gone_nodes: tuple[str, ...]
    index: Index
    reading: Reading


@dataclass(frozen=True)
class RankStream:
    """A worker's lanes of what is due."""

    due: Due
    lanes: range

    def batches(self) -> Iterator[Batch]:
        """The worker's part of every global batch still due, in order.

        Reading begins with the call, before the first batch is asked for. A batch is a view, whose
        content is another one's once the next window is being read: use it before asking on.

        Raises:
            BadInput: when iterated; a shard can't be read, or storage fails.
        """
        windows = list(windows_of(self.due, self.lanes))
        readers = ThreadPoolExecutor(max_workers=WINDOWS_AHEAD, thread_name_prefix="windows")
        # The one that is trained on, and those that are read meanwhile.
        spare: list[Batch | None] = [None] * (WINDOWS_AHEAD + 1)
        coming = [
            readers.submit(self._window, *window, spare.pop()) for window in windows[:WINDOWS_AHEAD]
        ]
        return self._cut_windows(windows, readers, coming, spare)

    def _cut_windows(
        self,
        windows: list[tuple[int, int]],
        readers: ThreadPoolExecutor,
        coming: list[Future[Batch]],
        spare: list[Batch | None],
    ) -> Iterator[Batch]:
        with readers:
            for place, (start, stop) in enumerate(windows):
                window = coming.pop(0).result()
                for following in windows[place + WINDOWS_AHEAD : place + WINDOWS_AHEAD + 1]:
                    coming.append(readers.submit(self._window, *following, spare.pop()))
                yield from _cut(window, (stop - start) // self.due.stream.batch_size)
                spare.append(window)

    @cached_property
    def _extents(self) -> Extents:
        return read_extents(self.due.reading.folder, self.due.index)

    def _window(self, start: int, stop: int, room: Batch | None = None) -> Batch:
        """Reads the worker's samples between two places in the stream, step after step.

        `room` is a window that nobody looks at any more: new memory takes longer to fill.
        """
        due = self.due
        rows = [self._row(piece, start) for piece in pieces(due.stream, self.lanes, start, stop)]
        wanted = (stop - start) // due.stream.lanes * len(self.lanes)
        tasks = max(TASKS_PER_WINDOW, wanted * due.reading.sample_bytes() // BYTES_PER_READ)
        cuts = np.linspace(0, len(rows), min(len(rows), tasks) + 1).astype(int)
        items = [{PIECES: packed(rows[begin:end])} for begin, end in pairwise(cuts)]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            read_pieces,
            batch_size=None,
            fn_kwargs={"reading": due.reading},
            num_cpus=CPUS_PER_READ,
            **elsewhere(due.gone_nodes),
        )
        _without_overhead(dataset.context)
        if room is None or len(room.labels) < wanted:
            room = Batch.empty(due.reading, wanted)
        window, filled = room.rows(0, wanted), 0
        for block in dataset.iter_batches(batch_size=None):
            for name in COLUMNS:
                getattr(window, name)[block["slot"]] = block[name]
            filled += len(block["slot"])
        assert filled == wanted, f"{filled} samples came, not {wanted}"
        return window

    def _row(self, piece: Piece, start: int) -> dict[str, Any]:
        """What a reading task must know of a piece, and where its samples go in the window."""
        stream, index = self.due.stream, self.due.index
        part = part_of(index, self._extents, stream.block_images, piece.shard, piece.members)
        lane_at = (
            piece.start - lane_images(stream, piece.lane, start) + np.arange(len(piece.members))
        )
        step, place = np.divmod(lane_at, stream.lane_size)
        row = (step * len(self.lanes) + piece.lane - self.lanes.start) * stream.lane_size + place
        return {**vars(part), "slots": row}


def _without_overhead(context: ray.data.DataContext) -> None:
    """Leaves out what Ray Data does for each task and a window has no need of.

    What it holds at most is bounded by its size. Sharing out resources among the steps of a
    pipeline, of which there is one, takes 10 ms for each task, and looking at its memory as long.
    """
    context.enable_progress_bars = False
    context.op_resource_reservation_enabled = False
    context.memory_usage_poll_interval_s = None
    # Else what a task raised is text in an exception of Ray Data's.
    context.raise_original_map_exception = True


def _cut(window: Batch, steps: int) -> Iterator[Batch]:
    """A window, step after step, as the batches of each."""
    size = len(window.labels) // steps
    for begin in range(0, steps * size, size):
        yield window.rows(begin, begin + size)


def elsewhere(nodes: Sequence[str]) -> dict[str, dict[str, str]]:
    """Ray's options for tasks and workers that must not run on these nodes."""
    return {"label_selector": {NODE_ID: f"!in({','.join(nodes)})"}} if nodes else {}


def windows_of(due: Due, lanes: range) -> Iterator[tuple[int, int]]:
    """What is due, a worker's window at a time: from where to where in the stream, in images.

    A window is whole batches, at least one, of as many samples of these lanes as are to be read at
    a time. The first windows are small, so that the first step needn't wait for a whole one.
    """
    step_bytes = len(lanes) * due.stream.lane_size * due.reading.sample_bytes()
    largest = max(1, due.window_bytes // step_bytes) * due.stream.batch_size
    start, size = due.start, FIRST_WINDOW_BATCHES * due.stream.batch_size
    while start < due.stop:
        stop = min(start + min(size, largest), due.stop)
        yield start, stop
        start, size = stop, 2 * size


def from_the_start(config: Config, index: Index, reading: Reading, images: int) -> Due:
    """So many images from the very start, to measure how fast they come: no run is behind it."""
    return Due(
        stream=stream_of(config, index),
        start=0,
        stop=images,
        window_bytes=config.data.window_megabytes * 10**6,
        checkpoint=None,
        worker_group="bench",
        began=time.time(),
        noise_stream=0,
        gone_nodes=(),
        index=index,
        reading=reading,
    )


def stream_of(config: Config, index: Index) -> Stream:
    """The samples of a run, in its order."""
    # In whole packs: those are read as one.
    packs = -(-(config.data.block_images or index.block_images()) // index.pack_images)
    return Stream(
        seed=config.run.seed,
        counts=tuple(shard.count for shard in index.shards),
        block_images=packs * index.pack_images,
        batch_size=config.optimisation.batch_size,
        lanes=config.optimisation.lanes,
    )


def reading_of(config: Config, index: Index, folder: Location) -> Reading:
    """How a job reads its shards: latents, images, or images that the VAE is to encode."""
    data, model = config.data, config.model
    encode = index.contents == "images" and config.latents.vae is not None
    side = model.resolution * (REDUCTION if encode else 1)
    return Reading(
        folder=folder,
        contents=index.contents,
        resolution=side,
        channels=IMAGE_CHANNELS if encode else model.channels,
        crop=index.resolution != side,
        num_classes=data.num_classes,
        scaling_factor=index.made_with.get("scaling_factor", 1.0),
        cache=Cache(data.cache_folder, int(data.cache_gigabytes * 10**9))
        if data.cache_folder
        else None,
    )


def open_shards(config: Config) -> tuple[Index, Reading]:
    """A job's shards: what they hold and how they are read.

    Raises:
        BadInput: they aren't there, or aren't what the index says or the model takes.
    """
    storage = config.storage
    folder = storage.locate(config.data.shards)
    index = read_index(folder)
    reading = reading_of(config, index, folder)
    check_fits(index, reading.resolution, reading.channels, reading.num_classes)
    check_shards(index, folder)
    return index, reading


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
