"""`cat-ray fid`: the distance of a checkpoint's samples to real images, with all it depends on."""

import json
import time
from dataclasses import asdict

import ray

from cat_ray.checkpoint.retain import lease
from cat_ray.connection import connected
from cat_ray.evaluation.fid_plan import Plan, featuriser_of, planned
from cat_ray.evaluation.measurement import Measurement
from cat_ray.evaluation.outputs import are_there, write_outputs
from cat_ray.evaluation.precision_recall_tasks import precision_and_recall
from cat_ray.evaluation.ranges import KEPT_RANGES, RangeStore, Speed, make_ranges
from cat_ray.evaluation.reference import Reference
from cat_ray.evaluation.result import Result, read_result
from cat_ray.evaluation.sample_plan import LEASE_SECONDS, checkpoint_of
from cat_ray.evaluation.statistics import (
    distances,
    pooled_features,
    real_moments,
    statistics_of,
)
from cat_ray.evaluation.workers import begin_work, resources_of
from cat_ray.folder_lock import locked
from cat_ray.storage import Location


def fid(job: Measurement) -> tuple[Result, Location]:
    """Measures a checkpoint, from the ranges that are there already; returns where the result is.

    What was measured before is only read.

    Raises:
        BadInput: checkpoint, weights or reference can't be used.
    """
    workers = job.workers
    # Before anything remote is asked for: what lies here is mended soonest.
    featuriser_of(job).check()
    checkpoint = checkpoint_of(job)
    with lease(checkpoint, LEASE_SECONDS):
        plan = planned(job, checkpoint)
        if are_there(plan):
            return read_result(plan.place()), plan.place()
        with (
            locked(plan.samples.folder, "cat-ray fid"),
            connected(workers.count * workers.cpus_per_worker, {}),
        ):
            for reals in (plan.reals.moments, plan.reals.neighbours):
                if isinstance(reals, RangeStore):
                    make_ranges(reals, workers, "real images")
            truncation = job.samples.truncation
            what = f"samples at truncation {truncation:g}" if truncation else "samples"
            speed, began = make_ranges(plan.samples, workers, what), time.time()
            # Not here: the features of all images take more memory than a driver should. And in a
            # process of its own, which may be of low priority.
            task = ray.remote(max_calls=1, **resources_of(workers) | {"num_gpus": 0})(_measured)
            measured = ray.get(task.remote(plan))
            result = _result(plan, *measured, speed, time.time() - began)
            write_outputs(plan)
            plan.place().write(json.dumps(asdict(result), indent=1).encode())
        plan.samples.folder.delete_folder()
    return result, plan.place()


def _measured(plan: Plan) -> tuple[str, dict[str, float]]:
    """The hash of the samples' pixels, and all figures."""
    workers, reals = plan.job.workers, plan.reals
    begin_work(workers.model_copy(update={"gpu": False}))
    samples = statistics_of(plan.samples)
    known = isinstance(reals.moments, Reference)
    theirs = reals.moments.moments if known else real_moments(reals.moments)
    figures = distances(samples, theirs)
    if reals.neighbours is not None:
        neighbours = pooled_features(reals.neighbours, KEPT_RANGES)
        figures |= precision_and_recall(pooled_features(plan.samples), neighbours, workers)
    return samples.pixels_sha256, figures


def _result(
    plan: Plan, pixels_sha256: str, figures: dict[str, float], speed: Speed, seconds: float
) -> Result:
    features = plan.job.features
    return Result(
        metric=plan.metric,
        figures=figures,
        protocol=plan.protocol()
        | {
            "features": features.network,
            "weights_sha256": features.sha256,
            "reference": plan.reals.sha256,
        },
        subject=plan.subject(),
        pixels_sha256=pixels_sha256,
        made_with=plan.made_with(),
        images_per_second=speed.per_second(),
        seconds={"start": speed.start_seconds, "samples": speed.seconds, "figures": seconds},
    )
