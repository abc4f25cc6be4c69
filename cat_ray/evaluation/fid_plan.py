"""All that a measurement needs, looked up before the work: what can't be used is found here."""

import hashlib
from dataclasses import dataclass, replace

import torch

from cat_ray.checkpoint.read import read_config
from cat_ray.config import Config
from cat_ray.data.index import INDEX_NAME, check_fits, check_shards, read_index
from cat_ray.data.read import Reading
from cat_ray.errors import BadInput
from cat_ray.evaluation.features import Featuriser
from cat_ray.evaluation.image_sources import FromNpz, FromShards, ImageSource
from cat_ray.evaluation.measurement import NEIGHBOURS, Measurement
from cat_ray.evaluation.ranges import (
    KEPT_RANGES,
    RANGE_IMAGES,
    RangeStore,
    digest_of,
    folder_of_ranges,
)
from cat_ray.evaluation.reference import Reference, read_reference
from cat_ray.evaluation.result import metric_name
from cat_ray.evaluation.sample_plan import (
    SamplePlan,
    copies_of,
    folder_of,
    generated,
    pixels_of,
)
from cat_ray.storage import Location

FEATURES = "features"


@dataclass(frozen=True)
class Reals:
    """The real images that samples are compared with.

    Attributes:
        kind: of the reference: `shards`, or `adm` for a published file.
        sha256: of what they are.
        moments: theirs, or the images that they are still to be taken of.
        neighbours: images that precision and recall compare with; none where only statistics are.
    """

    kind: str
    sha256: str
    moments: Reference | RangeStore
    neighbours: RangeStore | None


@dataclass(frozen=True)
class Plan(SamplePlan):
    """A measurement and all that was looked up for it; its stem is another one for other reals.

    Attributes:
        job: what was asked for.
        reals: what the samples are compared with.
        metric: what the distance is called.
    """

    job: Measurement
    reals: Reals
    metric: str


def planned(job: Measurement, checkpoint: Location) -> Plan:
    """Looks everything up.

    Raises:
        BadInput: checkpoint, weights or reference can't be used, or don't go together.
    """
    config = read_config(checkpoint)
    source = generated(job, config, checkpoint)
    reals = planned_reals(job, config)
    store = _store(job, source, job.samples.count)
    metric = metric_name(job.features.network, reals.kind, job.samples.count)
    digest = hashlib.sha256(f"{store.folder.name} {reals.sha256}".encode()).hexdigest()[:8]
    # A sweep's files are told apart by people.
    truncation = f"-truncation-{job.samples.truncation:g}" if job.samples.truncation else ""
    stem = f"{metric}-{checkpoint.name}{truncation}-{digest}"
    return Plan(
        job=job,
        checkpoint=checkpoint,
        config=config,
        side=pixels_of(config, job)[0],
        samples=replace(store, copies=copies_of(job, stem)),
        folder=folder_of(job),
        stem=stem,
        reals=reals,
        metric=metric,
    )


def planned_reals(job: Measurement, config: Config) -> Reals:
    """Looks the reference up, and makes sure that the networks are there.

    Raises:
        BadInput: weights or reference can't be used, or aren't for a run of this configuration.
    """
    side, channels = pixels_of(config, job)
    features = featuriser_of(job).load(torch.device("cpu"))
    black = torch.zeros(1, channels, side, side, dtype=torch.uint8)
    widths = {name: values.shape[1] for name, values in features(black).items()}
    place = job.storage.locate(job.reference)
    if (place / INDEX_NAME).exists():
        source = _real_images(job, config, place, side, channels)
        store = _store(job, source, source.index.images)
        # Whoever measures them, they are the same images by the same network.
        digest = digest_of(source.identity(), store.featuriser, store.count)
        return Reals("shards", f"{FEATURES}-{digest}", store, store)
    found = read_reference(place, side, widths)
    neighbours = None
    if found.images:
        count = min(found.images, KEPT_RANGES * RANGE_IMAGES)
        neighbours = _store(job, FromNpz(place, found.sha256, channels), count)
    return Reals("adm", found.sha256, found, neighbours)


def _real_images(
    job: Measurement, config: Config, place: Location, side: int, channels: int
) -> FromShards:
    index = read_index(place)
    if index.contents != "images":
        raise BadInput(f"reference {place.uri} holds {index.contents}: real images are needed")
    check_fits(index, side, channels, config.data.num_classes)
    check_shards(index, place)
    if index.images <= NEIGHBOURS:
        raise BadInput(f"reference {place.uri} holds {index.images} images: more are needed")
    reading = Reading(
        folder=place,
        contents=index.contents,
        resolution=side,
        channels=channels,
        crop=index.resolution != side,
        num_classes=config.data.num_classes,
    )
    return FromShards(reading, index)


def _store(job: Measurement, source: ImageSource, count: int) -> RangeStore:
    featuriser = featuriser_of(job)
    folder = folder_of_ranges(folder_of(job), FEATURES, source, featuriser, count, job.workers)
    return RangeStore(folder, source, featuriser, count)


def featuriser_of(job: Measurement) -> Featuriser:
    """What a job measures by."""
    return Featuriser(**job.features.model_dump())
