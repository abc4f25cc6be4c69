"""`cat-ray bench data`: how fast a job's shards come, step by step, and against two yardsticks.

The yardsticks are bare decoding of images that lie in memory, and the webdataset library with
PyTorch's DataLoader, each with as many processes as our path has reading tasks, in the same run.
"""

import io
import json
import multiprocessing
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from rich.table import Table
from torch.utils.data import DataLoader
from webdataset.gopen import gopen_schemes

from cat_ray.config import Config
from cat_ray.connection import connected
from cat_ray.data.crop import center_crop
from cat_ray.data.decode import IMAGE_ENDINGS, encoded_image
from cat_ray.data.image_file import FORMATS
from cat_ray.data.index import Extents, Index, read_extents
from cat_ray.data.order import blocks, mixing
from cat_ray.data.packs import unpack
from cat_ray.data.read import (
    Batch,
    Part,
    Reading,
    decode_part,
    fetch,
    part_of,
    read_parts,
)
from cat_ray.data.stream import (
    CPUS_PER_READ,
    RankStream,
    from_the_start,
    open_shards,
    stream_of,
)
from cat_ray.data.tar import RawSample, samples
from cat_ray.storage import Location

OURS, BARE, PEER = "cat-ray (Ray Data)", "bare decode", "webdataset + DataLoader"
ALONE_IMAGES = 512
PEER_BATCH = 64
MIXED_BATCHES = 16
# So great a part of the images as is measured comes before, unmeasured.
WARM_UP = 2
STREAM_BUFFER_BYTES = 2**22


@dataclass(frozen=True)
class DataSpeed:
    """Images per second of each repetition, by what was measured.

    Attributes:
        workers: processes that read and decode.
        steps: each step alone, in one process.
        paths: the whole way, with so many workers.
        batch_size: images in a batch.
        blocks: that a batch draws on, on average.
        shards: that a batch draws on, on average.
    """

    workers: int
    steps: Mapping[str, Sequence[float]]
    paths: Mapping[str, Sequence[float]]
    batch_size: int
    blocks: float
    shards: float

    def ratio(self, path: str) -> float:
        """Our median over that of another path."""
        return statistics.median(self.paths[OURS]) / statistics.median(self.paths[path])


def bench_data(config: Config, images: int, cpus: int, repetitions: int) -> DataSpeed:
    """Measures a job's shards; the repetitions of what is compared take turns.

    Args:
        config: the job, for its shards and what the model takes.
        images: how many to read each time.
        cpus: cores to use; each has as many processes as Ray gives reading tasks to it.
        repetitions: of each measurement.

    Raises:
        BadInput: the shards can't be read, or don't fit the model.
    """
    index, reading = open_shards(config)
    workers = int(cpus / CPUS_PER_READ)
    parts = _parts(config, index, read_extents(reading.folder, index))
    ways: dict[str, Callable[[], float]] = {
        PEER: partial(_peer, reading, index, images, workers),
        OURS: partial(_ours, config, reading, index, images),
    }
    steps: dict[str, list[float]] = {}
    paths: dict[str, list[float]] = {}
    with ExitStack() as around:
        if reading.contents == "images":
            processes = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            around.enter_context(processes)
            ways = {BARE: partial(_bare, processes, workers, reading, parts, images), **ways}
        around.enter_context(connected(0, {}, exactly=cpus))
        for _ in range(repetitions):
            for name, rate in _steps(reading, parts):
                steps.setdefault(name, []).append(rate)
            for name, measure in ways.items():
                paths.setdefault(name, []).append(measure())
    stream = stream_of(config, index)
    return DataSpeed(workers, steps, paths, stream.batch_size, *mixing(stream, MIXED_BATCHES))


def _parts(config: Config, index: Index, extents: Extents) -> list[Part]:
    """Whole blocks in random order, some hundreds of images of them."""
    stream = stream_of(config, index)
    of = blocks(stream)
    chosen = np.random.default_rng(0).permutation(len(of.shard))
    return [
        part_of(
            index,
            extents,
            stream.block_images,
            int(of.shard[block]),
            range(int(of.first[block]), int(of.first[block] + of.count[block])),
        )
        for block in chosen[: -(-ALONE_IMAGES // stream.block_images)]
    ]


def _steps(reading: Reading, parts: Sequence[Part]) -> Iterator[tuple[str, float]]:
    """Each step's rate, alone, in this process."""
    images = sum(part.count for part in parts)

    def timed(step: Callable[[], Any]) -> tuple[float, Any]:
        began = time.perf_counter()
        result = step()
        return images / (time.perf_counter() - began), result

    read, contents = timed(lambda: [fetch(reading, part) for part in parts])
    yield "read, one at a time", read
    untarred, raw = timed(
        lambda: [
            list(samples(content, part.shard, whole=False))
            for part, content in zip(parts, contents, strict=True)
        ]
    )
    yield "untar", untarred
    if reading.contents == "images":
        encoded = [encoded_image(sample.members) for block in raw for sample in block]
        decoded, pictures = timed(lambda: [np.asarray(_open(content)) for content in encoded])
        yield "decode (Pillow)", decoded
        if reading.crop:
            opened = [Image.fromarray(picture) for picture in pictures]
            yield "crop", timed(lambda: [center_crop(i, reading.resolution) for i in opened])[0]
    room = Batch.empty(reading, images)

    def decode(parts_and_blocks: Sequence[tuple[Part, list[RawSample]]]) -> None:
        row = 0
        for part, block in parts_and_blocks:
            decode_part(reading, part, block, room.rows(row, row + part.count))
            row += part.count

    # Once before: new memory takes longer to fill.
    decode(list(zip(parts, raw, strict=True)))
    ours, _ = timed(lambda: decode(list(zip(parts, raw, strict=True))))
    yield "decode and crop, as cat-ray does", ours
    batches = [room.rows(row, row + 1) for row in range(images)]
    yield "collate", timed(lambda: np.concatenate([one.content for one in batches]))[0]
    yield "all of it, one process", timed(lambda: read_parts(reading, parts))[0]


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=FORMATS).convert("RGB")


def _pixels(content: bytes, resolution: int) -> np.ndarray:
    """An encoded image as pixels `[R, R, 3]`, as anyone would write it."""
    image = _open(content)
    if image.size != (resolution, resolution):
        image = center_crop(image, resolution)
    return np.asarray(image)


def _bare(
    processes: ProcessPoolExecutor,
    workers: int,
    reading: Reading,
    parts: Sequence[Part],
    images: int,
) -> float:
    """The rate at which so many processes decode images that lie in their memory."""
    encoded = [
        encoded_image(sample.members)
        for part in parts
        for sample in samples(fetch(reading, part), part.shard, whole=False)
    ]
    each = images // workers
    running = [
        processes.submit(_decode_many, encoded, reading.resolution, each) for _ in range(workers)
    ]
    spans = [process.result() for process in running]
    # They begin together but for the time that their input takes to arrive.
    return each * workers / (max(end for _, end in spans) - min(begin for begin, _ in spans))


def _decode_many(encoded: Sequence[bytes], resolution: int, images: int) -> tuple[float, float]:
    began = time.time()
    for place in range(images):
        _pixels(encoded[place % len(encoded)], resolution)
    return began, time.time()


def _peer(reading: Reading, index: Index, images: int, workers: int) -> float:
    """The rate of the webdataset library with PyTorch's DataLoader."""
    place = partial(_open_stream, reading.folder)
    names = [f"cat-ray-bench:{shard.name}" for shard in index.shards]
    dataset = webdataset.WebDataset(names, shardshuffle=False, empty_check=False)
    if reading.contents == "latents":
        pipeline = dataset.map(_peer_pack)
        batch = index.pack_images
    else:
        pipeline = dataset.map(partial(_peer_image, resolution=reading.resolution))
        pipeline, batch = pipeline.batched(PEER_BATCH), PEER_BATCH
    with warnings.catch_warnings():
        # More processes than cores: as many as ours are.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            pipeline.repeat(),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="spawn",
            worker_init_fn=partial(_register, place),
        )
    return _rate((batch for _ in loader), images)


def _register(place: Callable[[str], Any], worker: int) -> None:
    gopen_schemes["cat-ray-bench"] = place


def _open_stream(folder: Location, url: str, mode: str = "rb", bufsize: int = 0) -> Any:
    place = folder / url.split(":", 1)[1]
    if place.local_path is not None:
        return place.local_path.open("rb")
    return place.filesystem.open_input_stream(place.path, buffer_size=STREAM_BUFFER_BYTES)


def _peer_image(sample: dict[str, Any], resolution: int) -> tuple[np.ndarray, int]:
    content = next(sample[ending] for ending in IMAGE_ENDINGS if ending in sample)
    return _pixels(content, resolution), int(sample["cls"])


def _peer_pack(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    members = {name: value for name, value in sample.items() if not name.startswith("__")}
    pack = unpack(RawSample(sample["__key__"], members), sample["__url__"])
    return pack.latents, pack.classes


def _ours(config: Config, reading: Reading, index: Index, images: int) -> float:
    """The rate at which one worker gets its batches, reading with all of the cluster's CPUs."""
    batch_size, lanes = config.optimisation.batch_size, config.optimisation.lanes
    stop = 2 * -(-images // batch_size) * batch_size
    due = from_the_start(config, index, reading, stop)
    batches = RankStream(due, range(lanes)).batches()
    return _rate((len(batch.labels) for batch in batches), images)


def _rate(counts: Iterator[int], images: int) -> float:
    """Images per second once processes have started and memory was used before."""
    deque(_until(counts, images // WARM_UP), maxlen=0)
    began = time.perf_counter()
    return sum(_until(counts, images)) / (time.perf_counter() - began)


def _until(counts: Iterator[int], images: int) -> Iterator[int]:
    """Batches until there are so many images."""
    seen = 0
    while seen < images:
        count = next(counts)
        seen += count
        yield count


def bench_tables(speed: DataSpeed) -> Iterator[Table]:
    """The figures, for a person: medians with the range."""
    steps = Table("step", "images/s", "least", "most", title="each step alone, one process")
    for name, rates in speed.steps.items():
        steps.add_row(name, *_row(rates))
    yield steps
    caption = (
        f"a batch of {speed.batch_size} draws on {speed.blocks:,.0f} blocks of neighbours, "
        f"of {speed.shards:,.0f} shards"
    )
    title = f"{speed.workers} processes"
    paths = Table("path", "images/s", "least", "most", "cat-ray is", title=title, caption=caption)
    for name, rates in speed.paths.items():
        paths.add_row(name, *_row(rates), f"{speed.ratio(name):.2f} x" if name != OURS else "")
    yield paths


def to_json(speed: DataSpeed) -> str:
    """The same for scripts."""
    ratios = {name: speed.ratio(name) for name in speed.paths if name != OURS}
    return json.dumps({**asdict(speed), "ratios": ratios}, indent=1)


def _row(rates: Sequence[float]) -> list[str]:
    return [f"{value:,.0f}" for value in (statistics.median(rates), min(rates), max(rates))]
