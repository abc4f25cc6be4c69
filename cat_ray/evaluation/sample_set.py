"""`cat-ray sample JOB`: many samples of a checkpoint as files, made range by range in parallel."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from cat_ray.checkpoint.retain import lease
from cat_ray.connection import connected
from cat_ray.errors import BadInput
from cat_ray.evaluation.measurement import Sampling
from cat_ray.evaluation.outputs import are_there, write_outputs
from cat_ray.evaluation.ranges import make_ranges
from cat_ray.evaluation.sample_plan import LEASE_SECONDS, SamplePlan, checkpoint_of, planned_samples
from cat_ray.evaluation.statistics import statistics_of
from cat_ray.folder_lock import locked
from cat_ray.storage import Location


@dataclass(frozen=True)
class SampleSet:
    """What was made, of what, and how; a file beside the samples.

    Attributes:
        protocol: which samples.
        subject: whose they are.
        pixels_sha256: of them all, as in a result of `cat-ray fid`: equal sets have equal ones.
        figures: CAT's three measures of the stages' agreement, means over all samples.
        made_with: versions and device.
        images_per_second: of this call, while the processes worked.
    """

    protocol: Mapping[str, Any]
    subject: Mapping[str, Any]
    pixels_sha256: str
    figures: Mapping[str, float]
    made_with: Mapping[str, str]
    images_per_second: Mapping[str, float]


_SAMPLE_SET = TypeAdapter(SampleSet)


def make_samples(job: Sampling) -> tuple[SampleSet, Location]:
    """Makes the samples that aren't there yet; returns what they are and the file that tells it.

    Raises:
        BadInput: the checkpoint or the VAE can't be used, or the storage fails.
    """
    workers = job.workers
    checkpoint = checkpoint_of(job)
    with lease(checkpoint, LEASE_SECONDS):
        plan = planned_samples(job, checkpoint)
        if are_there(plan):
            return _read(plan.place()), plan.place()
        with (
            locked(plan.samples.folder, "cat-ray sample"),
            connected(workers.count * workers.cpus_per_worker, {}),
        ):
            speed = make_ranges(plan.samples, workers, "samples")
            made = _sample_set(plan, speed.per_second())
            write_outputs(plan)
            plan.place().write(json.dumps(asdict(made), indent=1).encode())
    plan.samples.folder.delete_folder()
    return made, plan.place()


def _sample_set(plan: SamplePlan, images_per_second: Mapping[str, float]) -> SampleSet:
    found = statistics_of(plan.samples)
    return SampleSet(
        protocol=plan.protocol(),
        subject=plan.subject(),
        pixels_sha256=found.pixels_sha256,
        figures=found.figures,
        made_with=plan.made_with(),
        images_per_second=images_per_second,
    )


def _read(place: Location) -> SampleSet:
    try:
        return _SAMPLE_SET.validate_json(place.read())
    except ValueError as error:
        raise BadInput(f"{place.uri} tells of no samples: delete it") from error
