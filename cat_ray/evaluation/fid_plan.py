"""All that a measurement needs, looked up before the work: what can't be used is found here."""

import hashlib
from dataclasses import dataclass, replace

import torch

from cat_ray.checkpoint.layout import MANIFEST
from cat_ray.checkpoint.read import read_config
from cat_ray.config import Config
from cat_ray.data.index import INDEX_NAME, check_fits, check_shards, read_index
from cat_ray.data.latents import IMAGE_CHANNELS, REDUCTION
from cat_ray.data.read import Reading
from cat_ray.errors import BadInput
from cat_ray.evaluation.copies import Copies
from cat_ray.evaluation.features import Featuriser
from cat_ray.evaluation.image_sources import FromNpz, FromShards, Generated, ImageSource
from cat_ray.evaluation.measurement import Measurement
from cat_ray.evaluation.precision_recall import NEIGHBOURS
from cat_ray.evaluation.ranges import KEPT_RANGES, RANGE_IMAGES, RangeStore, digest_of
from cat_ray.evaluation.reference import Reference, read_reference
from cat_ray.evaluation.result import metric_name
from cat_ray.storage import Location, locate

SHEET_IMAGES = 100


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
class Plan:
    """A measurement and all that was looked up for it.

    Attributes:
        job: what was asked for.
        checkpoint: whose samples they are.
        config: that it was trained with.
        side: of the images.
        samples: their ranges.
        reals: what they are compared with.
        metric: what the distance is called.
        folder: of the result.
        stem: that the names of its files begin with; another one for other samples or reals.
    """

    job: Measurement
    checkpoint: Location
    config: Config
    side: int
    samples: RangeStore
    reals: Reals
    metric: str
    folder: Location
    stem: str

    def place(self, ending: str = ".json") -> Location:
        """The result's file, or one beside it."""
        return self.folder / f"{self.stem}{ending}"


def planned(job: Measurement, checkpoint: Location) -> Plan:
    """Looks everything up.

    Raises:
        BadInput: checkpoint, weights or reference can't be used, or don't go together.
    """
    config = read_config(checkpoint)
    source = _generated(job, config, checkpoint)
    reals = planned_reals(job, config)
    store = _store(job, source, job.samples.count)
    metric = metric_name(job.features.network, reals.kind, job.samples.count)
    digest = hashlib.sha256(f"{store.folder.name} {reals.sha256}".encode()).hexdigest()[:8]
    stem = f"{metric}-{checkpoint.name}-{digest}"
    folder = _folder(job)
    copies = Copies(
        pixels=job.samples.count if job.output.npz else SHEET_IMAGES,
        png=folder / f"{stem}-png" if job.output.png else None,
        shards=folder / f"{stem}-shards" if job.output.shards else None,
    )
    return Plan(
        job=job,
        checkpoint=checkpoint,
        config=config,
        side=pixels_of(config, job)[0],
        samples=replace(store, copies=copies),
        reals=reals,
        metric=metric,
        folder=folder,
        stem=stem,
    )


def planned_reals(job: Measurement, config: Config) -> Reals:
    """Looks the reference up, and makes sure that the networks are there.

    Raises:
        BadInput: weights or reference can't be used, or aren't for a run of this configuration.
    """
    side, channels = pixels_of(config, job)
    features = _featuriser(job).load(torch.device("cpu"))
    black = torch.zeros(1, channels, side, side, dtype=torch.uint8)
    widths = {name: values.shape[1] for name, values in features(black).items()}
    place = locate(job.reference, job.storage.endpoint_url, job.storage.region)
    if (place / INDEX_NAME).exists():
        source = _real_images(job, config, place, side, channels)
        store = _store(job, source, source.index.images)
        return Reals("shards", store.folder.name, store, store)
    found = read_reference(place, side, widths)
    neighbours = None
    if found.images:
        count = min(found.images, KEPT_RANGES * RANGE_IMAGES)
        neighbours = _store(job, FromNpz(place, found.sha256, channels), count)
    return Reals("adm", found.sha256, found, neighbours)


def pixels_of(config: Config, job: Measurement) -> tuple[int, int]:
    """Side and channels of the pictures that a run's generator makes."""
    model, latent = config.model, config.makes_latents()
    if latent and job.latents.vae is None:
        raise BadInput(
            "the generator makes latents: latents.vae must name the VAE that decodes them"
        )
    if not latent and job.latents.vae is not None:
        raise BadInput("the generator makes pictures: leave latents.vae out")
    if latent:
        return model.resolution * REDUCTION, IMAGE_CHANNELS
    return model.resolution, model.channels


def _generated(job: Measurement, config: Config, checkpoint: Location) -> Generated:
    asked = job.samples
    decays = config.optimisation.ema_decays
    if asked.decay not in (None, 0.0, *decays):
        raise BadInput(
            f"samples.decay {asked.decay}: the checkpoint has {', '.join(map(str, decays))}"
        )
    return Generated(
        checkpoint=checkpoint,
        digest=hashlib.sha256((checkpoint / MANIFEST).read()).hexdigest(),
        decay=decays[0] if asked.decay is None else asked.decay,
        seed=asked.seed,
        labels=asked.labels,
        truncation=asked.truncation,
        vae=job.latents.vae,
        revision=job.latents.revision,
    )


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
        crop=index.resolution is None,
        num_classes=config.data.num_classes,
        retry_seconds=job.storage.retry_seconds,
    )
    return FromShards(reading, index)


def _store(job: Measurement, source: ImageSource, count: int) -> RangeStore:
    featuriser = _featuriser(job)
    name = f"features-{digest_of(source.identity(), featuriser, count)}"
    return RangeStore(_folder(job) / name, source, featuriser, count)


def _featuriser(job: Measurement) -> Featuriser:
    return Featuriser(**job.features.model_dump())


def _folder(job: Measurement) -> Location:
    return locate(job.output.folder, job.storage.endpoint_url, job.storage.region)
