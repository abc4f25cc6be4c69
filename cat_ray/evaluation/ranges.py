"""Features of numbered images, made range by range by any number of processes.

A finished range is a file in storage. What is in it follows from the images' numbers alone, so a
job that was interrupted, or goes on with more or fewer processes, ends with the same bits.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import ray.data
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cat_ray.data.tasks import rows_of
from cat_ray.errors import BadInput
from cat_ray.evaluation.features import Featuriser
from cat_ray.evaluation.image_sources import Images, ImageSource
from cat_ray.evaluation.measurement import Workers
from cat_ray.operations.counting import Counting
from cat_ray.storage import Location

# Splits of the Inception score are of 5,000 images: whole ranges.
RANGE_IMAGES = 1000
PIXELS, PIXELS_SHA256 = "pixels", "pixels_sha256"


@dataclass(frozen=True)
class RangeStore:
    """The finished ranges of some images.

    Attributes:
        folder: theirs.
        source: where the images come from.
        featuriser: what they are measured by.
        count: images in all.
        keep_pixels: whether the images themselves are kept beside their features.
    """

    folder: Location
    source: ImageSource
    featuriser: Featuriser
    count: int
    keep_pixels: bool = False

    def ranges(self) -> list[range]:
        """All of them, in order."""
        starts = range(0, self.count, RANGE_IMAGES)
        return [range(begin, min(begin + RANGE_IMAGES, self.count)) for begin in starts]

    def due(self) -> list[range]:
        """Those that aren't there yet."""
        there = self.folder.sizes().keys()
        return [
            numbers
            for numbers in self.ranges()
            if not {place.name for place in self._needed(numbers)} <= there
        ]

    def place(self, numbers: range) -> Location:
        """The file of a range's features."""
        return self.folder / f"images-{numbers.start:09d}-{numbers.stop:09d}.safetensors"

    def pixels_place(self, numbers: range) -> Location:
        """The file of a range's images, where they are kept."""
        return self.folder / f"images-{numbers.start:09d}-{numbers.stop:09d}.pixels.safetensors"

    def _needed(self, numbers: range) -> list[Location]:
        pixels = [self.pixels_place(numbers)] if self.keep_pixels else []
        return [self.place(numbers), *pixels]

    def pixels(self, numbers: range) -> Tensor:
        """The images of a finished range, `[n, c, H, W]` uint8."""
        return safetensors.torch.load(self.pixels_place(numbers).read())[PIXELS]

    def read(self, numbers: range) -> tuple[dict[str, Tensor], str]:
        """Of a finished range the features by name, `[n, d]`, and the hash of its pixels.

        Raises:
            BadInput: the file is damaged.
        """
        place = self.place(numbers)
        content = place.read()
        try:
            features = safetensors.torch.load(content)
        except SafetensorError as error:
            raise BadInput(
                f"{place.uri} is damaged: delete it and run the command again"
            ) from error
        header_bytes = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_bytes])
        return features, header["__metadata__"][PIXELS_SHA256]


class RangeMaker:
    """Holds the networks, and makes ranges; a Ray Data actor."""

    def __init__(self, store: RangeStore, workers: Workers):
        # A sum's rounding depends on the number of threads: it is the job's, not the machine's.
        torch.set_num_threads(workers.cpus_per_worker)
        self._device = torch.device("cuda" if workers.gpu else "cpu")
        self._store = store

    # Not at once: what goes wrong in a call is told to the user, a failed start is only repeated.
    @cached_property
    def _images(self) -> Images:
        return self._store.source.load(self._device)

    @cached_property
    def _features(self) -> Callable[[Tensor], dict[str, Tensor]]:
        return self._store.featuriser.load(self._device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Makes the range of a row, and tells how long each stage of it took, in seconds."""
        numbers = range(row["start"], row["stop"])
        make, measure = self._images, self._features
        began = time.perf_counter()
        images = make(numbers).contiguous()
        made = time.perf_counter()
        features = measure(images)
        measured = time.perf_counter()
        if self._store.keep_pixels:
            content = safetensors.torch.save({PIXELS: images})
            self._store.pixels_place(numbers).write(content)
        digest = hashlib.sha256(images.numpy().data).hexdigest()
        content = safetensors.torch.save(features, {PIXELS_SHA256: digest})
        self._store.place(numbers).write(content)
        return {
            **row,
            "images": made - began,
            "features": measured - made,
            "write": time.perf_counter() - measured,
        }


@dataclass(frozen=True)
class Speed:
    """How fast a call was.

    Attributes:
        images: that it made.
        seconds: from the first process's start to the last range's end.
        stages: seconds of each stage, over all processes.
    """

    images: int
    seconds: float
    stages: dict[str, float]

    def per_second(self) -> dict[str, float]:
        """Images per second of the whole, and of each stage in one process."""
        if not self.images:
            return {}
        alone = {name: self.images / seconds for name, seconds in self.stages.items()}
        return {"all": self.images / self.seconds, **alone}


def make_ranges(store: RangeStore, workers: Workers, what: str) -> Speed:
    """Makes the ranges that aren't there yet.

    Args:
        store: theirs.
        workers: who does it, where Ray runs.
        what: the images are, for the progress that is shown.

    Raises:
        BadInput: the images or the networks can't be had.
    """
    due, began = store.due(), time.perf_counter()
    stages = {"images": 0.0, "features": 0.0, "write": 0.0}
    made = 0
    total = len(store.ranges())
    if due:
        with Counting(f"ranges of {what}", total, done=total - len(due)) as counting:
            for row in _rows(store, workers, due):
                made += row["stop"] - row["start"]
                stages = {name: seconds + row[name] for name, seconds in stages.items()}
                rate = made / (time.perf_counter() - began)
                counting.add(f"{rate:,.0f} images/s")
    return Speed(made, time.perf_counter() - began, stages)


def _rows(store: RangeStore, workers: Workers, due: list[range]) -> Iterator[dict[str, Any]]:
    rows = [{"start": numbers.start, "stop": numbers.stop} for numbers in due]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        RangeMaker,
        fn_constructor_kwargs={"store": store, "workers": workers},
        num_cpus=workers.cpus_per_worker,
        num_gpus=int(workers.gpu),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(workers.count, len(rows))),
    )
    return rows_of(dataset)


def digest_of(identity: dict[str, Any], featuriser: Featuriser, count: int) -> str:
    """A name for the features of so many images: other images or features have another one."""
    whole = [identity, asdict(featuriser) | {"weights": None}, count]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
