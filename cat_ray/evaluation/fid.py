"""`cat-ray fid`: the distance of a checkpoint's samples to real images, with all it depends on."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
import torch
from rich.table import Table

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
from cat_ray.evaluation.reference import read_reference
from cat_ray.evaluation.sampling import class_labels
from cat_ray.evaluation.statistics import (
    Statistics,
    distances,
    precision_and_recall,
    statistics_of,
)
from cat_ray.storage import Location, locate

# A measurement may take a day.
LEASE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Result:
    """What was measured, of what, and how.

    Attributes:
        metric: the name of the distance; another protocol has another name.
        figures: the distance and what else was measured, by name.
        protocol: what must be the same for two distances to be comparable.
        subject: whose samples they are.
        pixels_sha256: of the samples: equal sets have equal ones.
        made_with: versions and device.
        images_per_second: of this call.
    """

    metric: str
    figures: Mapping[str, float]
    protocol: Mapping[str, Any]
    subject: Mapping[str, Any]
    pixels_sha256: str
    made_with: Mapping[str, str]
    images_per_second: Mapping[str, float]


def fid(job: Measurement) -> tuple[Result, Location]:
    """Measures a checkpoint, from the ranges that are there already; returns where the result is.

    Raises:
        BadInput: checkpoint, weights or reference can't be used.
    """
    storage = job.storage
    folder = locate(job.output.folder, storage.endpoint_url, storage.region)
    checkpoint = resolve(locate(job.samples.checkpoint, storage.endpoint_url, storage.region))
    featuriser = Featuriser(**job.features.model_dump())
    with ExitStack() as around:
        around.enter_context(lease(checkpoint, LEASE_SECONDS))
        config = read_config(checkpoint)
        side, channels = _pixels_of(config, job)
        source = _samples(job, config, checkpoint)
        samples = replace(
            _store(folder, source, featuriser, job.samples.count), keep_pixels=job.output.npz
        )
        # What can't be used is found before the work.
        featuriser.load(torch.device("cpu"))
        reals = _reals(job, config, folder, featuriser, side, channels)
        needed = job.workers.count * job.workers.cpus_per_worker
        around.enter_context(connected(needed, {}))
        if isinstance(reals, RangeStore):
            make_ranges(reals, job.workers, "real images")
        speed = make_ranges(samples, job.workers, "samples")
        measured = ray.get(
            ray.remote(num_cpus=1)(_figures).remote(samples, reals, featuriser, channels)
        )
    result = _result(job, config, checkpoint, source, measured, side, speed)
    name = f"{result.metric}-{checkpoint.name}-{samples.folder.name[-8:]}"
    if job.output.npz:
        _write_npz(folder / f"{name}.npz", samples, source, config.data.num_classes)
    place = folder / f"{name}.json"
    place.write(json.dumps(asdict(result), indent=1).encode())
    return result, place


def _write_npz(place: Location, samples: RangeStore, source: Generated, num_classes: int) -> None:
    """The samples in ADM's format, which knows colours only; the ranges' own pixels go."""
    ranges = samples.ranges()
    side = samples.pixels(ranges[0]).shape[-1]
    parts = (
        samples.pixels(numbers).expand(-1, IMAGE_CHANNELS, -1, -1).permute(0, 2, 3, 1).numpy()
        for numbers in ranges
    )
    labels = class_labels(source.labels, source.seed, range(samples.count), num_classes)
    with place.written() as file:
        write_images(file, (samples.count, side, side, IMAGE_CHANNELS), parts, labels.numpy())
    for numbers in ranges:
        samples.pixels_place(numbers).delete()


def metric_name(network: str, reference: str, count: int) -> str:
    """What a Frechet distance is called: never FID-50K what isn't on 50,000 samples.

    Args:
        network: of the features.
        reference: `adm`, a published file, or `shards`.
        count: samples.
    """
    short = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    return f"fid{short}_{reference}" if network == "inception" else f"{network}{short}_{reference}"


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


def _reals(
    job: Measurement,
    config: Config,
    folder: Location,
    featuriser: Featuriser,
    side: int,
    channels: int,
) -> RangeStore | Location:
    """The shards' images, or the file of a published reference."""
    storage = job.storage
    place = locate(job.reference, storage.endpoint_url, storage.region)
    if not (place / INDEX_NAME).exists():
        # Its shapes are looked at now, its numbers at the end.
        read_reference(place, *featuriser.widths(channels))
        return place
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
        retry_seconds=storage.retry_seconds,
    )
    return _store(folder, FromShards(reading, index), featuriser, index.images)


def _store(
    folder: Location, source: Generated | FromShards, featuriser: Featuriser, count: int
) -> RangeStore:
    name = f"features-{digest_of(source.identity(), featuriser, count)}"
    return RangeStore(folder / name, source, featuriser, count)


def _figures(
    samples: RangeStore, reals: RangeStore | Location, featuriser: Featuriser, channels: int
) -> tuple[Statistics, dict[str, float], str]:
    """All numbers, and the hash of the reference."""
    own = statistics_of(samples)
    if isinstance(reals, Location):
        found = read_reference(reals, *featuriser.widths(channels))
        return own, distances(own, found.pooled, found.spatial), found.sha256
    theirs = statistics_of(reals)
    figures = distances(own, theirs.pooled, theirs.spatial)
    return own, figures | precision_and_recall(samples, reals), theirs.pixels_sha256


def _result(
    job: Measurement,
    config: Config,
    checkpoint: Location,
    source: Generated,
    measured: tuple[Statistics, dict[str, float], str],
    side: int,
    speed: Speed,
) -> Result:
    own, figures, reference_sha256 = measured
    asked = job.samples
    published = "precision" not in figures
    metric = metric_name(job.features.network, "adm" if published else "shards", asked.count)
    return Result(
        metric=metric,
        figures=figures,
        protocol={
            "samples": asked.count,
            "labels": asked.labels,
            "truncation": asked.truncation,
            "side": side,
            "classes": config.data.num_classes,
            "rounding": "nearest",
            "vae": job.latents.vae,
            "vae_revision": job.latents.revision,
            "features": job.features.network,
            "weights_sha256": job.features.sha256,
            "reference_sha256": reference_sha256,
        },
        subject={
            "checkpoint": checkpoint.uri,
            "manifest_sha256": source.digest,
            "images": read_state(checkpoint).images,
            "decay": source.decay,
            "seed": asked.seed,
        },
        pixels_sha256=own.pixels_sha256,
        made_with={
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": "cuda" if job.workers.gpu else "cpu",
            "cpus_per_worker": str(job.workers.cpus_per_worker),
        },
        images_per_second=speed.per_second(),
    )


def result_table(result: Result) -> Table:
    """The figures, for people."""
    table = Table(title=f"{result.metric}: {result.subject['images']:,} images seen")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.figures.items():
        table.add_row(result.metric if name == "frechet" else name, f"{value:.6g}")
    for name, rate in result.images_per_second.items():
        what = "images/s, all processes" if name == "all" else f"images/s of a process, {name}"
        table.add_row(what, f"{rate:,.0f}")
    return table


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Why two results' distances are not comparable, a line for each reason; none if they are."""
    if a["metric"] != b["metric"]:
        yield f"metric: {a['metric']}, {b['metric']}"
    for name in sorted({*a["protocol"], *b["protocol"]}):
        one, other = a["protocol"].get(name), b["protocol"].get(name)
        if one != other:
            yield f"{name}: {one}, {other}"


def read_result(place: Location) -> dict[str, Any]:
    """A result file's content.

    Raises:
        BadInput: it is none.
    """
    try:
        found = json.loads(place.read())
        return {name: found[name] for name in ("metric", "figures", "protocol", "subject")}
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{place.uri} is no result of `cat-ray fid`") from error
