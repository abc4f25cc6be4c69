"""`cat-ray fid`: the distance of a checkpoint's samples to real images, with all it depends on."""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, replace

import ray
import torch

from cat_ray.checkpoint.layout import MANIFEST
from cat_ray.checkpoint.read import read_config, read_state, resolve
from cat_ray.checkpoint.retain import lease
from cat_ray.config import Config
from cat_ray.connection import connected
from cat_ray.data.index import INDEX_NAME, check_fits, check_shards, read_index
from cat_ray.data.latents import IMAGE_CHANNELS, REDUCTION
from cat_ray.data.read import Reading
from cat_ray.errors import BadInput
from cat_ray.evaluation.features import Featuriser
from cat_ray.evaluation.image_sources import FromShards, Generated
from cat_ray.evaluation.measurement import Measurement
from cat_ray.evaluation.npz import write_images
from cat_ray.evaluation.ranges import RangeStore, Speed, digest_of, make_ranges
from cat_ray.evaluation.reference import Reference, read_reference
from cat_ray.evaluation.result import Result, metric_name, read_result
from cat_ray.evaluation.sampling import class_labels
from cat_ray.evaluation.statistics import (
    distances,
    precision_and_recall,
    statistics_of,
)
from cat_ray.storage import Location, locate

# A measurement may take a day.
LEASE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Plan:
    """A measurement and all that was looked up for it.

    Attributes:
        job: what was asked for.
        folder: of results and ranges.
        checkpoint: whose samples they are.
        config: that it was trained with.
        side: of the images.
        samples: their ranges.
        reals: the shards' images, or what a published file says of them.
    """

    job: Measurement
    folder: Location
    checkpoint: Location
    config: Config
    side: int
    samples: RangeStore
    reals: RangeStore | Reference

    @property
    def reference(self) -> str:
        """A hash of the real images."""
        return self.reals.folder.name if isinstance(self.reals, RangeStore) else self.reals.sha256

    @property
    def metric(self) -> str:
        """What the distance is called."""
        kind = "shards" if isinstance(self.reals, RangeStore) else "adm"
        return metric_name(self.job.features.network, kind, self.job.samples.count)

    def place(self, ending: str) -> Location:
        """A file of the result: other ones for other samples or reals."""
        whole = f"{self.samples.folder.name} {self.reference}"
        digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
        return self.folder / f"{self.metric}-{self.checkpoint.name}-{digest}.{ending}"


def fid(job: Measurement) -> tuple[Result, Location]:
    """Measures a checkpoint, from the ranges that are there already; returns where the result is.

    What was measured before is only read.

    Raises:
        BadInput: checkpoint, weights or reference can't be used.
    """
    storage = job.storage
    checkpoint = resolve(locate(job.samples.checkpoint, storage.endpoint_url, storage.region))
    with lease(checkpoint, LEASE_SECONDS):
        plan = _planned(job, checkpoint)
        place, npz = plan.place("json"), plan.place("npz")
        if place.exists() and (npz.exists() or not job.output.npz):
            return read_result(place), place
        with connected(job.workers.count * job.workers.cpus_per_worker, {}):
            if isinstance(plan.reals, RangeStore):
                make_ranges(plan.reals, job.workers, "real images")
            speed = make_ranges(plan.samples, job.workers, "samples")
            # Not here: the features of all images take more memory than a driver should.
            measured = ray.get(ray.remote(num_cpus=1)(_measured).remote(plan))
        result = _result(plan, *measured, speed)
    if job.output.npz:
        _write_npz(npz, plan)
    place.write(json.dumps(asdict(result), indent=1).encode())
    return result, place


def _planned(job: Measurement, checkpoint: Location) -> Plan:
    """Looks everything up: what can't be used is found before the work."""
    storage = job.storage
    folder = locate(job.output.folder, storage.endpoint_url, storage.region)
    config = read_config(checkpoint)
    side, channels = _pixels_of(config, job)
    featuriser = Featuriser(**job.features.model_dump())
    featuriser.load(torch.device("cpu"))
    samples = _store(folder, _samples(job, config, checkpoint), featuriser, job.samples.count)
    place = locate(job.reference, storage.endpoint_url, storage.region)
    if (place / INDEX_NAME).exists():
        source = _real_images(job, config, place, side, channels)
        reals = _store(folder, source, featuriser, source.index.images)
    else:
        reals = read_reference(place, *featuriser.widths(channels))
    return Plan(
        job=job,
        folder=folder,
        checkpoint=checkpoint,
        config=config,
        side=side,
        samples=replace(samples, keep_pixels=job.output.npz),
        reals=reals,
    )


def _pixels_of(config: Config, job: Measurement) -> tuple[int, int]:
    """Side and channels of the pictures that a run's generator makes."""
    model = config.model
    latent = config.latents.vae is not None or model.channels not in (1, 3)
    if latent and job.latents.vae is None:
        raise BadInput(
            "the generator makes latents: latents.vae must name the VAE that decodes them"
        )
    if not latent and job.latents.vae is not None:
        raise BadInput("the generator makes pictures: leave latents.vae out")
    if latent:
        return model.resolution * REDUCTION, IMAGE_CHANNELS
    return model.resolution, model.channels


def _samples(job: Measurement, config: Config, checkpoint: Location) -> Generated:
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


def _store(
    folder: Location, source: Generated | FromShards, featuriser: Featuriser, count: int
) -> RangeStore:
    name = f"features-{digest_of(source.identity(), featuriser, count)}"
    return RangeStore(folder / name, source, featuriser, count)


def _measured(plan: Plan) -> tuple[str, dict[str, float]]:
    """The hash of the samples' pixels, and all figures."""
    samples, reals = statistics_of(plan.samples), plan.reals
    theirs = statistics_of(reals) if isinstance(reals, RangeStore) else reals
    figures = distances(samples, theirs.pooled, theirs.spatial)
    if isinstance(reals, RangeStore):
        figures |= precision_and_recall(plan.samples, reals)
    return samples.pixels_sha256, figures


def _write_npz(place: Location, plan: Plan) -> None:
    """The samples in ADM's format, which knows colours only; the ranges' own pixels go."""
    store, asked = plan.samples, plan.job.samples
    parts = (
        store.pixels(numbers).expand(-1, IMAGE_CHANNELS, -1, -1).permute(0, 2, 3, 1).numpy()
        for numbers in store.ranges()
    )
    classes = plan.config.data.num_classes
    labels = class_labels(asked.labels, asked.seed, range(asked.count), classes)
    with place.written() as file:
        shape = (asked.count, plan.side, plan.side, IMAGE_CHANNELS)
        write_images(file, shape, parts, labels.numpy())
    for numbers in store.ranges():
        store.pixels_place(numbers).delete()


def _result(plan: Plan, pixels_sha256: str, figures: dict[str, float], speed: Speed) -> Result:
    job, asked = plan.job, plan.job.samples
    assert isinstance(plan.samples.source, Generated)
    return Result(
        metric=plan.metric,
        figures=figures,
        protocol={
            "samples": asked.count,
            "labels": asked.labels,
            "truncation": asked.truncation,
            "side": plan.side,
            "classes": plan.config.data.num_classes,
            "rounding": "nearest",
            "vae": job.latents.vae,
            "vae_revision": job.latents.revision,
            "features": job.features.network,
            "weights_sha256": job.features.sha256,
            "reference": plan.reference,
        },
        subject={
            "checkpoint": plan.checkpoint.uri,
            "manifest_sha256": plan.samples.source.digest,
            "images": read_state(plan.checkpoint).images,
            "decay": plan.samples.source.decay,
            "seed": asked.seed,
        },
        pixels_sha256=pixels_sha256,
        made_with={
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": "cuda" if job.workers.gpu else "cpu",
            "cpus_per_worker": str(job.workers.cpus_per_worker),
        },
        images_per_second=speed.per_second(),
    )
