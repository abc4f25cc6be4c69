"""Features of numbered images, made range by range by any number of processes.

A finished range is a file in storage. What is in it follows from the images' numbers alone, so a
job that was interrupted, or goes on with more or fewer processes, ends with the same bits.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import ray.data
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cat_ray.data.tasks import rows_of
from cat_ray.errors import BadInput
from cat_ray.evaluation.copies import Copies
from cat_ray.evaluation.features import Featuriser, MakeFeatures
from cat_ray.evaluation.image_sources import ImageSource, MakeImages
from cat_ray.evaluation.measurement import Workers
from cat_ray.evaluation.workers import begin_work, resources_of
from cat_ray.operations.counting import Counting
from cat_ray.storage import Location

# Splits of the Inception score are of 5,000 images: whole ranges.
RANGE_IMAGES = 1000
# Once a folder has the statistics of all its ranges, only the first are kept: precision and recall
# compare with the first 10,000 real images.
STATISTICS, KEPT_RANGES = "statistics.safetensors", 10
PIXELS_SHA256, FIGURE = "pixels_sha256", "figure."
STAGES = ("images", "features", "write")
ONE_THREAD = Workers()

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RangeStore:
    """The finished ranges of some images.

    Attributes:
        folder: theirs.
        source: where the images come from.
        featuriser: what they are measured by; None where they are only made.
        count: images in all.
        copies: what is kept of the images themselves.
    """

    folder: Location
    source: ImageSource
    featuriser: Featuriser | None
    count: int
    copies: Copies = field(default_factory=Copies)

    def ranges(self) -> list[range]:
        """All of them, in order."""
        starts = range(0, self.count, RANGE_IMAGES)
        return [range(begin, min(begin + RANGE_IMAGES, self.count)) for begin in starts]

    def due(self) -> list[range]:
        """Those that aren't there yet, and are still needed."""
        folders = [self.folder, self.copies.png, self.copies.shards]
        there = {f"{folder.path}/{name}" for folder in folders if folder for name in folder.sizes()}
        summed_up = (self.folder / STATISTICS).path in there
        return [
            numbers
            for numbers in self.ranges()[: KEPT_RANGES if summed_up else None]
            if not {place.path for place in self._needed(numbers)} <= there
        ]

    def place(self, numbers: range) -> Location:
        """The file of a range's features."""
        return self.folder / f"images-{numbers.start:09d}-{numbers.stop:09d}.safetensors"

    def _needed(self, numbers: range) -> list[Location]:
        return [self.place(numbers), *self.copies.places(self.folder, numbers)]

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
        self._device = begin_work(workers)
        self._store = store

    # Not at once: what goes wrong in a call is told to the user, a failed start is only repeated.
    @cached_property
    def _images(self) -> MakeImages:
        return self._store.source.load(self._device)

    @cached_property
    def _features(self) -> MakeFeatures:
        featuriser = self._store.featuriser
        return featuriser.load(self._device) if featuriser else lambda images: {}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Makes the range of a row, and tells how long each stage of it took, in seconds."""
        numbers = range(row["start"], row["stop"])
        make, measure = self._images, self._features
        clock, began = time.time(), time.perf_counter()
        images = make(numbers)
        made = time.perf_counter()
        features = measure(images.pixels)
        features |= {f"{FIGURE}{name}": values for name, values in images.figures.items()}
        measured = time.perf_counter()
        self._store.copies.write(self._store.folder, numbers, images)
        digest = hashlib.sha256(images.pixels.contiguous().numpy().data).hexdigest()
        content = safetensors.torch.save(features, {PIXELS_SHA256: digest})
        self._store.place(numbers).write(content)
        written = time.perf_counter()
        return {
            **row,
            "began": clock,
            "ended": clock + written - began,
            "images": made - began,
            "features": measured - made,
            "write": written - measured,
        }


@dataclass(frozen=True)
class Speed:
    """How fast a call was.

    Attributes:
        images: that it made.
        start_seconds: until the first of the processes had loaded its networks.
        seconds: from then until the last range's end.
        stages: seconds of each stage, over all processes.
    """

    images: int
    start_seconds: float
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
    due, called = store.due(), time.time()
    if not due:
        return Speed(0, 0.0, 0.0, {})
    rows: list[dict[str, Any]] = []
    total = len(store.ranges())
    with Counting(f"ranges of {what}", total, done=total - len(due)) as counting:
        for row in _rows(store, workers, due):
            rows.append(row)
            counting.add(f"{_speed(rows, called).per_second()['all']:,.0f} images/s")
    return _speed(rows, called)


def _speed(rows: list[dict[str, Any]], called: float) -> Speed:
    """Of finished ranges, by the clocks of the machines that made them."""
    began = min(row["began"] for row in rows)
    return Speed(
        images=sum(row["stop"] - row["start"] for row in rows),
        start_seconds=began - called,
        seconds=max(row["ended"] for row in rows) - began,
        stages={stage: sum(row[stage] for row in rows) for stage in STAGES},
    )


def _rows(store: RangeStore, workers: Workers, due: list[range]) -> Iterator[dict[str, Any]]:
    rows = [{"start": numbers.start, "stop": numbers.stop} for numbers in due]
    processes = min(workers.count, len(rows))
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        RangeMaker,
        fn_constructor_kwargs={"store": store, "workers": workers},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=processes, initial_size=processes),
        **resources_of(workers),
    )
    return rows_of(dataset)


def digest_of(
    identity: dict[str, Any],
    featuriser: Featuriser | None,
    count: int,
    workers: Workers = ONE_THREAD,
) -> str:
    """A name for the features of so many images: other images or features have another one.

    So have the same ones from another kind of device or another number of threads, which round
    otherwise; but not from another number of workers.
    """
    features = asdict(featuriser) | {"weights": None} if featuriser else None
    whole: list[Any] = [identity, features, count]
    # One thread of a CPU has the name that all had before they were told apart.
    if _rounding(workers) != _rounding(ONE_THREAD):
        whole.append(_rounding(workers))
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def _rounding(workers: Workers) -> dict[str, Any]:
    return {"gpu": workers.gpu, "threads": workers.cpus_per_worker}


def folder_of_ranges(
    parent: Location,
    form: str,
    source: ImageSource,
    featuriser: Featuriser | None,
    count: int,
    workers: Workers,
) -> Location:
    """Where ranges lie, by all that their content follows from.

    Args:
        parent: the folder that it lies in.
        form: what its name begins with.
        source: of the images.
        featuriser: what they are measured by, if they are.
        count: images.
        workers: who makes them.
    """
    made, plain = (
        parent / f"{form}-{digest_of(source.identity(), featuriser, count, each)}"
        for each in (workers, ONE_THREAD)
    )
    if made.path != plain.path and plain.sizes() and not made.sizes():
        logger.warning(
            "%s was made on one thread of a CPU, or by an earlier version that doesn't tell on "
            "what: its ranges are made anew in %s",
            plain.uri,
            made.uri,
        )
    return made
