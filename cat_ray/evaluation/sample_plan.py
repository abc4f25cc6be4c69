"""All that samples by index need, looked up before the work, and what they follow from."""

import hashlib
import platform
from dataclasses import dataclass
from typing import Any

import torch

from cat_ray.checkpoint.layout import MANIFEST
from cat_ray.checkpoint.read import read_config, read_state, resolve
from cat_ray.config import Config
from cat_ray.data.latent_shape import IMAGE_CHANNELS, REDUCTION
from cat_ray.errors import BadInput
from cat_ray.evaluation.copies import Copies
from cat_ray.evaluation.image_sources import Generated
from cat_ray.evaluation.measurement import Sampling
from cat_ray.evaluation.ranges import RangeStore, folder_of_ranges
from cat_ray.storage import Location

SHEET_IMAGES = 100
RANGES = "ranges"
# Samples of a large model, or a measurement, may take a day.
LEASE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class SamplePlan:
    """Samples to be made, and all that was looked up for them.

    Attributes:
        job: what was asked for.
        checkpoint: whose samples they are.
        config: that it was trained with.
        side: of the images.
        samples: their ranges.
        folder: of what is kept.
        stem: that the names of its files begin with; another one for other samples.
    """

    job: Sampling
    checkpoint: Location
    config: Config
    side: int
    samples: RangeStore
    folder: Location
    stem: str

    def place(self, ending: str = ".json") -> Location:
        """The file that tells of the samples, or one beside it."""
        return self.folder / f"{self.stem}{ending}"

    def protocol(self) -> dict[str, Any]:
        """What must be the same for the samples of two checkpoints to be comparable."""
        asked, latents = self.job.samples, self.job.latents
        return {
            "samples": asked.count,
            "labels": asked.labels,
            "truncation": asked.truncation,
            "side": self.side,
            "classes": self.config.data.num_classes,
            "rounding": "nearest",
            "vae": latents.vae,
            "vae_revision": latents.revision,
        }

    def subject(self) -> dict[str, Any]:
        """Whose samples they are."""
        assert isinstance(self.samples.source, Generated)
        return {
            "checkpoint": self.checkpoint.uri,
            "manifest_sha256": self.samples.source.digest,
            "images": read_state(self.checkpoint).images,
            "decay": self.samples.source.decay,
            "seed": self.job.samples.seed,
        }

    def made_with(self) -> dict[str, str]:
        """Versions and device, on which the last digits may depend."""
        workers = self.job.workers
        return {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": "cuda" if workers.gpu else "cpu",
            "cpus_per_worker": str(workers.cpus_per_worker),
        }


def planned_samples(job: Sampling, checkpoint: Location) -> SamplePlan:
    """Looks everything up.

    Raises:
        BadInput: the checkpoint can't be used, or the job keeps nothing of its samples.
    """
    output = job.output
    if not (output.npz or output.png or output.shards):
        raise BadInput("output keeps no samples: set output.png, output.shards or output.npz")
    config = read_config(checkpoint)
    source = generated(job, config, checkpoint)
    folder, count = folder_of(job), job.samples.count
    ranges = folder_of_ranges(folder, RANGES, source, None, count, job.workers)
    digest = ranges.name.removeprefix(f"{RANGES}-")
    stem = f"samples-{checkpoint.name}-{digest[:8]}"
    return SamplePlan(
        job=job,
        checkpoint=checkpoint,
        config=config,
        side=pixels_of(config, job)[0],
        samples=RangeStore(ranges, source, None, count, copies_of(job, stem)),
        folder=folder,
        stem=stem,
    )


def pixels_of(config: Config, job: Sampling) -> tuple[int, int]:
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


def generated(job: Sampling, config: Config, checkpoint: Location) -> Generated:
    """The checkpoint's samples that a job asks for.

    Raises:
        BadInput: the checkpoint doesn't have that average.
    """
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


def copies_of(job: Sampling, stem: str) -> Copies:
    """What is kept of the samples, beside files that begin with the stem."""
    folder = folder_of(job)
    return Copies(
        pixels=job.samples.count if job.output.npz else SHEET_IMAGES,
        png=folder / f"{stem}-png" if job.output.png else None,
        shards=folder / f"{stem}-shards" if job.output.shards else None,
    )


def checkpoint_of(job: Sampling) -> Location:
    """The checkpoint that a job names, or the newest one of the run that it names.

    Raises:
        BadInput: it is neither.
    """
    storage = job.storage
    return resolve(storage.locate(job.samples.checkpoint))


def folder_of(job: Sampling) -> Location:
    """Where a job's output lies."""
    return job.storage.locate(job.output.folder)
