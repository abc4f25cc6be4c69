"""One shard of a preparation, from its plan to its file: what a task of the Ray Data job does."""

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from cat_ray.data.ahead import in_order
from cat_ray.data.crop import center_crop
from cat_ray.data.decode import BrokenSample, open_image
from cat_ray.data.encoder import Encodings
from cat_ray.data.image_file import opened_image
from cat_ray.data.packs import Pack
from cat_ray.data.parquet_source import read_rows
from cat_ray.data.preparation import Output
from cat_ray.data.shard_file import Entry
from cat_ray.data.shard_plan import ShardPlan, Take
from cat_ray.data.sources import Encoded, Source, read_unit

PARALLEL_READS, READ_AHEAD = 16, 64
# Row groups may have gigabytes.
ROW_GROUPS_AHEAD = 2
ENCODED_AHEAD = 2
JPEG_QUALITY = 95
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}

# Takes pixels `[n, S, S, 3]` and gives a call that waits for what became of them.
Encode = Callable[[np.ndarray], Callable[[], Encodings]]
Broken = Callable[[str], None]


def read_plan(source: Source, plan: ShardPlan) -> Iterator[Encoded]:
    """The samples of a shard in their order; some units are read ahead, several at a time."""

    def read(take: Take) -> list[Encoded]:
        if source.kind == "parquet":
            return read_rows(source, take.unit, take.first, take.stop)
        return read_unit(source, take.unit)[take.first : take.stop]

    ahead = ROW_GROUPS_AHEAD if source.kind == "parquet" else READ_AHEAD
    with ThreadPoolExecutor(PARALLEL_READS) as readers:
        takes = (take for group in plan.groups for take in group)
        coming = in_order(readers, read, takes, ahead)
        for number, group in enumerate(plan.groups):
            order = plan.order(number)
            if order == list(range(len(order))):
                for _ in group:
                    yield from next(coming)
            else:
                samples = [sample for _ in group for sample in next(coming)]
                yield from (samples[place] for place in order)


def image_entries(samples: Iterator[Encoded], output: Output, broken: Broken) -> Iterator[Entry]:
    """Samples as image entries; those that can't be used are told, and left out."""
    for sample in samples:
        try:
            ending, content = _image(sample, output)
        except BrokenSample as error:
            broken(f"{sample.key}: {error}")
            continue
        members = {ending: content, "cls": str(sample.label).encode()}
        yield Entry(sample.key, members, [sample.label])


def latent_entries(
    samples: Iterator[Encoded], output: Output, broken: Broken, encode: Encode, first: str
) -> Iterator[Entry]:
    """Samples as packs of latents, encoded while the next are read."""
    waiting: deque[tuple[list[Encoded], Callable[[], Encodings]]] = deque()
    number = 0

    def packed() -> Entry:
        nonlocal number
        members, result = waiting.popleft()
        encoded = result()
        labels = [sample.label for sample in members]
        keys = [sample.key for sample in members]
        pack = Pack(encoded.latents, np.asarray(labels, dtype=np.int64), keys, encoded.tokens)
        number += 1
        return Entry(f"{first}-{number - 1:06d}", pack.members(), labels)

    held: list[Encoded] = []
    pixels: list[np.ndarray] = []
    for sample in samples:
        try:
            pixels.append(np.asarray(pixels_of(sample, output)))
        except BrokenSample as error:
            broken(f"{sample.key}: {error}")
            continue
        held.append(sample)
        if len(held) == output.pack_images:
            waiting.append((held, encode(np.stack(pixels))))
            held, pixels = [], []
            if len(waiting) > ENCODED_AHEAD:
                yield packed()
    if held:
        waiting.append((held, encode(np.stack(pixels))))
    while waiting:
        yield packed()


def pixels_of(sample: Encoded, output: Output) -> Image.Image:
    """A sample's picture, cropped as ADM does.

    Raises:
        BrokenSample: it has no class or no readable image.
    """
    _check(sample)
    return center_crop(open_image(sample.content, output.channels), output.resolution)


def _image(sample: Encoded, output: Output) -> tuple[str, bytes]:
    """A sample's image as it is to be stored: its ending, and its content."""
    if output.encoding == "original":
        _check(sample)
        open_image(sample.content, output.channels)
        with opened_image(sample.content) as image:
            kind = image.format or ""
        if kind not in ENDINGS:
            raise BrokenSample(f"a {kind} file, not one of {', '.join(ENDINGS)}")
        return ENDINGS[kind], sample.content
    content = io.BytesIO()
    image = pixels_of(sample, output)
    if output.encoding == "png":
        image.save(content, format="PNG")
        return "png", content.getvalue()
    image.save(content, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "jpg", content.getvalue()


def _check(sample: Encoded) -> None:
    if not sample.content:
        raise BrokenSample(sample.problem or "it has no image, or no class")
    if sample.label < 0:
        raise BrokenSample("it has no class")
