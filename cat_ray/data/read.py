"""Shards to samples, whole or block by block, wherever it runs: no Ray here."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np

from cat_ray.data.ahead import in_order
from cat_ray.data.cache import Cache
from cat_ray.data.decode import BrokenSample, decode_sample
from cat_ray.data.index import EXTENTS_NAME, Extents, Index, Shard
from cat_ray.data.packs import LATENTS, unpack
from cat_ray.data.tar import RawSample, read_samples, samples
from cat_ray.errors import BadInput, Damaged
from cat_ray.storage import Location

PARALLEL_READS = 16


@dataclass(frozen=True)
class Reading:
    """How shards are read.

    Attributes:
        folder: where they lie.
        contents: what they hold.
        resolution: the side wanted, of images in pixels; that of latents is what it is.
        channels: of an image or a latent.
        crop: images of any size are scaled and cropped to the side wanted; else they must have it.
        num_classes: class ids must be below this.
        scaling_factor: what latents are multiplied by before the networks see them.
        cache: what keeps the parts that were read, if anything does.
    """

    folder: Location
    contents: Literal["images", "latents"]
    resolution: int
    channels: int
    crop: bool
    num_classes: int
    scaling_factor: float = 1.0
    cache: Cache | None = None

    def shape(self) -> tuple[int, int, int]:
        """Of a sample: pixels `[R, R, c]`, latents `[2c, R, R]`."""
        if self.contents == "images":
            return self.resolution, self.resolution, self.channels
        return 2 * self.channels, self.resolution, self.resolution

    def dtype(self) -> type[np.generic]:
        """Of a sample's numbers."""
        return np.uint8 if self.contents == "images" else np.float16

    def sample_bytes(self) -> int:
        """Of a sample in memory."""
        return math.prod(self.shape()) * np.dtype(self.dtype()).itemsize


@dataclass(frozen=True)
class Part:
    """Some samples of a block, to be read together.

    Attributes:
        shard: its name.
        begin: where the block begins in the shard, in bytes.
        end: where it ends.
        first: the place in the shard of the block's first sample.
        count: samples in the block.
        members: those wanted, by their place in the shard.
    """

    shard: str
    begin: int
    end: int
    first: int
    count: int
    members: tuple[int, ...]


def part_of(
    index: Index, extents: Extents, block_images: int, shard: int, members: Sequence[int]
) -> Part:
    """Some samples of one block of a shard, and where the block lies.

    Args:
        index: the data set's.
        extents: where its packs lie.
        block_images: samples in a block, whole packs.
        shard: which, by its place in the index.
        members: the samples wanted, by their place in the shard; all of one block.

    Raises:
        Damaged: the block lies beyond the shard's end.
    """
    record, pack = index.shards[shard], index.pack_images
    first = members[0] // block_images * block_images
    count = min(block_images, record.count - first)
    places = extents[record.name]
    begin, end = places[first // pack], places[-(-(first + count) // pack)]
    if end > record.bytes:
        raise Damaged(
            f"{EXTENTS_NAME} has a block of shard {record.name} end at byte {end}, beyond its "
            f"{record.bytes}: make it anew with `cat-ray index`"
        )
    return Part(record.name, int(begin), int(end), first, count, tuple(members))


@dataclass(frozen=True)
class Batch:
    """A worker's part of a global batch, or of a window of them.

    Attributes:
        content: pixels `[n, R, R, c]` uint8, or latents' mean and deviation `[n, 2c, R, R]`.
        labels: `[n]` int64.
        keys: `[n]`, each sample's shard and name in it.
        broken: for each sample "", or a line where it can't be read and a neighbour stands in.
    """

    content: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    broken: np.ndarray

    @classmethod
    def empty(cls, reading: Reading, size: int) -> "Batch":
        """Room for so many samples."""
        return cls(
            content=np.empty((size, *reading.shape()), reading.dtype()),
            labels=np.empty(size, np.int64),
            # Names and messages have any length.
            keys=np.empty(size, object),
            broken=np.empty(size, object),
        )

    def rows(self, begin: int, end: int) -> "Batch":
        """A view of some rows."""
        columns = (self.content, self.labels, self.keys, self.broken)
        return Batch(*(column[begin:end] for column in columns))


def read_parts(reading: Reading, parts: Sequence[Part], room: Batch | None = None) -> Batch:
    """Reads parts of blocks, the next ones while one is decoded; rows in the order of the members.

    `room` is for just so many samples, if there is memory to be used again.

    A sample that can't be decoded is replaced by the nearest good one of its block, so that counts
    and order stay as planned, whatever else of the block is wanted.

    Raises:
        BadInput: a shard can't be read, or isn't as indexed, or none of a block's samples is good.
    """
    batch = room or Batch.empty(reading, sum(len(part.members) for part in parts))
    row = 0
    contents = in_order(_readers(), partial(fetch, reading), parts, PARALLEL_READS)
    for part, content in zip(parts, contents, strict=True):
        raw = _samples_in(content, part, reading)
        decode_part(reading, part, raw, batch.rows(row, row + len(part.members)))
        row += len(part.members)
    return batch


def _samples_in(content: bytes, part: Part, reading: Reading) -> list[RawSample]:
    raw = list(samples(content, part.shard, whole=False))
    if reading.contents == "images" and len(raw) != part.count:
        # Older indexes count a LICENSE, say, as a broken sample: runs go on with them.
        as_before = list(samples(content, part.shard, whole=False, all_members=True))
        return as_before if len(as_before) == part.count else raw
    return raw


def fetch(reading: Reading, part: Part) -> bytes:
    """A block's bytes, from the cache or from storage."""
    place = reading.folder / part.shard
    key = f"{place.uri} {part.begin} {part.end}"
    held = reading.cache.get(key) if reading.cache else None
    if held is not None:
        return held
    content = place.read_range(part.begin, part.end)
    if reading.cache:
        reading.cache.put(key, content)
    return content


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(PARALLEL_READS, thread_name_prefix="reads")


def decode_part(reading: Reading, part: Part, raw: list[RawSample], out: Batch) -> None:
    """Puts the wanted samples of a block, which is given as it lies in the shard, into `out`."""
    decode = _decode_packs if reading.contents == "latents" else _decode_images
    decode(reading, part, raw, out)


def _decode_packs(reading: Reading, part: Part, raw: list[RawSample], out: Batch) -> None:
    packs = [unpack(sample, part.shard) for sample in raw]
    _check_count(part, sum(len(pack.classes) for pack in packs))
    latents = np.concatenate([pack.latents for pack in packs])
    if latents.shape[1:] != reading.shape():
        raise BadInput(f"shard {part.shard} holds latents {latents.shape[1:]}, not as indexed")
    rows = np.asarray(part.members) - part.first
    np.take(latents, rows, axis=0, out=out.content)
    out.labels[:] = np.concatenate([pack.classes for pack in packs])[rows]
    names = [key for pack in packs for key in pack.keys]
    out.keys[:] = [f"{part.shard}/{names[row]}" for row in rows]
    out.broken[:] = ""


def _decode_images(reading: Reading, part: Part, raw: list[RawSample], out: Batch) -> None:
    _check_count(part, len(raw))
    for row, member in enumerate(part.members):
        sample = raw[member - part.first]
        decode = partial(_decode_one, reading, out=out.content[row])
        out.keys[row], out.broken[row] = f"{part.shard}/{sample.key}", ""
        try:
            out.labels[row] = decode(sample)
        except BrokenSample as error:
            out.broken[row] = f"{part.shard}: {sample.key}: {error}"
            out.labels[row] = _stand_in(part, raw, member, decode)


def _decode_one(reading: Reading, sample: RawSample, out: np.ndarray) -> int:
    return decode_sample(sample, reading.num_classes, reading.crop, out)


def _stand_in(
    part: Part, raw: list[RawSample], member: int, decode: Callable[[RawSample], int]
) -> int:
    """The good sample of the block that is nearest to a broken one."""
    for other in sorted(range(part.count), key=lambda other: abs(other + part.first - member)):
        try:
            return decode(raw[other])
        except BrokenSample:
            continue
    raise BadInput(
        f"none of the samples {part.first} to {part.first + part.count - 1} of shard {part.shard} "
        "can be read: look at them with `cat-ray index --verify`"
    )


def _check_count(part: Part, found: int) -> None:
    if found != part.count:
        raise BadInput(
            f"shard {part.shard} holds {found} samples between bytes {part.begin} and {part.end}, "
            f"not {part.count}: index it anew with `cat-ray index`"
        )


def read_shard(folder: Location, shard: Shard) -> list[RawSample]:
    """All samples of a shard as they lie there; for latents, all packs.

    Raises:
        BadInput: the shard can't be read, or holds another number of samples than indexed.
    """
    found = list(samples((folder / shard.name).read(), shard.name))
    count = sum(
        len(unpack(sample, shard.name).classes) if LATENTS in sample.members else 1
        for sample in found
    )
    if count != shard.count:
        raise BadInput(f"shard {shard.name} holds {count} samples, not {shard.count}")
    return found


def read_images(reading: Reading, index: Index, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The first readable images `[N, R, R, c]` uint8, at most `limit`, and their classes `[N]`."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for sample in _all_samples(reading.folder, index):
        image = np.empty(reading.shape(), dtype=np.uint8)
        try:
            labels.append(_decode_one(reading, sample, image))
        except BrokenSample:
            continue
        images.append(image)
        if len(images) == limit:
            break
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _all_samples(folder: Location, index: Index) -> Iterator[RawSample]:
    for shard in index.shards:
        yield from read_samples(folder / shard.name, shard.bytes)
