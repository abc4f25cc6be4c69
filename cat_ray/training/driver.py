"""The driver: checks everything before a worker starts, then hands over to Ray Train."""

import contextlib
import logging
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from cat_ray.checkpoint.commit import commit_abandoned
from cat_ray.checkpoint.layout import images_of
from cat_ray.checkpoint.read import any_committed, newest, newest_sound, read_state
from cat_ray.checkpoint.retain import lease
from cat_ray.config import Config, dump
from cat_ray.connection import check_connection, connected
from cat_ray.data.index import INDEX_NAME, Index, check_shards
from cat_ray.data.stream import (
    CPUS_PER_READ,
    DATASET_NAME,
    Due,
    LaneDataConfig,
    keep_helpers_here,
    open_shards,
    reading_of,
    stream_of,
)
from cat_ray.errors import BadInput, ExpectedError, GaveWay, RunFailed, Unfinished
from cat_ray.folder_lock import locked
from cat_ray.operations.identity import check_claim, claim
from cat_ray.operations.outcome import outcome_written, stopped_with
from cat_ray.operations.progress import Progress
from cat_ray.operations.prometheus import Exported
from cat_ray.ray_errors import TRAINING_ADVICE, described
from cat_ray.schedule import check_has_no_schedule
from cat_ray.stop_signals import stoppable
from cat_ray.storage import Location
from cat_ray.training import elasticity
from cat_ray.training.beginning import check_beginning, pinned
from cat_ray.training.elasticity import (
    ElasticTrainer,
    GroupClock,
    Scaling,
    TerminationSignal,
    told_to_user,
)
from cat_ray.training.faults import Fault
from cat_ray.training.health import read_roll_backs
from cat_ray.training.process import worker_environment
from cat_ray.training.requests import ask_to_stop, forget_stop
from cat_ray.training.watchdog import has_stalled_lately
from cat_ray.training.worker import work

RAY_FOLDER = "ray"
COLLECTIVE_SECONDS = 1800

logger = logging.getLogger(__name__)


def train(config: Config, faults: Sequence[Fault] = ()) -> Location:
    """Runs a job to its end, from the newest complete checkpoint if its folder has one.

    Args:
        config: the job.
        faults: what a drill lets happen on the way.

    Returns:
        Where the report is.

    Raises:
        BadInput: something in the job, the data or the storage can't be used.
        Unfinished: the run was stopped, or its machines were taken away; it can go on.
        RunFailed: training failed more often than the configuration allows.
    """
    check_has_no_schedule(config, "this command")
    check_connection()
    storage = config.storage
    run = storage.locate(config.run.folder)
    shards = storage.locate(config.data.shards)
    index = _checked_index(config, shards)
    config = _at(pinned(config, run), run, shards)
    begins = check_beginning(config, run)
    check_claim(run, config, index.digest())
    with locked(run, "cat-ray train"):
        claim(run, config, index.digest())
        forget_stop(run)
        with outcome_written(run, lambda: _images(run)), stoppable():
            _train(config, run, shards, index, begins, faults)
            # Not above: it imports matplotlib.
            from cat_ray.operations.report import write_report

            return write_report(run)


def _train(
    config: Config,
    run: Location,
    shards: Location,
    index: Index,
    begins: bool,
    faults: Sequence[Fault],
) -> None:
    def still_due() -> Due:
        # Ray Train calls this in its controller whenever a worker group starts: here, and only
        # here, it is decided which checkpoint all workers go on from.
        return _still_due(config, run, shards, index)

    if still_due().start >= config.run.total_images:
        logger.warning("%s was trained to its end before: nothing is left to do", run.uri)
        return
    session = uuid.uuid4().hex[:8]
    exported = _exported(config, run, session)
    progress = Progress(run, session, config.run.total_images, exported.update)
    measuring = _measuring(config, run, session)
    weights = _kept(config) if begins else contextlib.nullcontext()
    # Ray and the workers' imports take a while.
    logger.warning("%s: starting up to %d workers", run.uri, config.workers.maximum)
    with cluster(config), _stopping(run), progress, measuring, weights:
        _fit(config, run, session, still_due, faults)


def _still_due(config: Config, run: Location, shards: Location, index: Index) -> Due:
    check_shards(index, shards)
    commit_abandoned(run)
    roll_backs = read_roll_backs(run)
    if len(roll_backs) > config.health.max_rollbacks:
        raise RunFailed(
            f"the run was rolled back {len(roll_backs)} times, health.max_rollbacks is "
            f"{config.health.max_rollbacks}; the last time at {roll_backs[-1].images:,} images: "
            f"{roll_backs[-1].reason}"
        )
    checkpoint = newest_sound(run)
    if checkpoint is None and any_committed(run):
        raise BadInput(
            f"every checkpoint in {run.uri} is damaged: restore one from a copy, or choose another "
            "run.folder to begin anew"
        )
    reading = reading_of(config, index, shards)
    return Due(
        stream=stream_of(config, index),
        start=read_state(checkpoint).images if checkpoint else 0,
        stop=config.run.total_images,
        window_bytes=config.data.window_megabytes * 10**6,
        checkpoint=checkpoint.uri if checkpoint else None,
        worker_group=uuid.uuid4().hex[:6],
        began=GroupClock.began,
        noise_stream=len(roll_backs),
        gone_nodes=Scaling.gone,
        index=index,
        reading=reading,
    )


def _images(run: Location) -> int:
    checkpoint = newest(run)
    return images_of(checkpoint.name) if checkpoint else 0


def _at(config: Config, run: Location, shards: Location) -> Config:
    """The same job with full paths: the workers have other working directories."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"folder": run.uri}),
            "data": config.data.model_copy(update={"shards": shards.uri}),
        }
    )


def _checked_index(config: Config, shards: Location) -> Index:
    if config.data.source is not None and not (shards / INDEX_NAME).exists():
        # Not above: it imports matplotlib, which Ray Train's controller needn't wait for.
        from cat_ray.data.prepare import digits, prepare

        prepare(digits(config.data.shards, config.storage))
    return open_shards(config)[0]


def _fit(
    config: Config,
    run: Location,
    session: str,
    still_due: Callable[[], Due],
    faults: Sequence[Fault],
) -> None:
    workers = config.workers
    os.environ.update(elasticity.environment(workers.start_seconds, workers.stall_seconds))
    keep_helpers_here()
    # Ray Train's controller, which runs on this machine, looks once whether it can write there, and
    # dies if it can't; it keeps nothing, as no checkpoint is reported to it.
    with tempfile.TemporaryDirectory(prefix="cat-ray-") as ray_storage:
        trainer = _trainer(config, run, session, still_due, faults, ray_storage)
        try:
            trainer.fit()
        except TrainingFailedError as error:
            told = told_to_user(error)
            if isinstance(told, GaveWay):
                raise Unfinished(
                    f"{stopped_with(newest(run))} ({told}); run the same command again to go on"
                ) from error
            if told is not None:
                raise told from error
            told = described(error, TRAINING_ADVICE, has_stalled_lately(run))
            raise RunFailed(f"training failed: {told}") from error


def _trainer(
    config: Config,
    run: Location,
    session: str,
    still_due: Callable[[], Due],
    faults: Sequence[Fault],
    ray_storage: str,
) -> ElasticTrainer:
    workers = config.workers
    return ElasticTrainer(
        work,
        progress=lambda: _images(run),
        capacity_seconds=workers.capacity_seconds,
        max_preemptions=workers.max_preemptions,
        train_loop_config={"config": dump(config), "session": session, "faults": tuple(faults)},
        torch_config=TorchConfig(
            backend="nccl" if workers.gpu else "gloo", timeout_s=COLLECTIVE_SECONDS
        ),
        scaling_config=ScalingConfig(
            num_workers=(workers.minimum, workers.maximum),
            elastic_resize_monitor_interval_s=workers.resize_check_seconds,
            use_gpu=workers.gpu,
            resources_per_worker={
                "CPU": workers.cpus_per_worker,
                **({"GPU": 1} if workers.gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=ray_storage,
            failure_config=FailureConfig(
                max_failures=workers.max_failures,
                max_preemption_failures=(
                    -1 if workers.max_preemptions is None else workers.max_preemptions
                ),
                # Workers that stay may still upload what was handed to them.
                preemption_grace_s=workers.stall_seconds,
            ),
            callbacks=[GroupClock(), TerminationSignal()],  # pyright: ignore[reportArgumentType]
            worker_runtime_env={"env_vars": worker_environment(workers)},
        ),
        datasets={DATASET_NAME: still_due},  # pyright: ignore[reportArgumentType]
        dataset_config=LaneDataConfig(),
    )


def _kept(config: Config) -> contextlib.AbstractContextManager[None]:
    """Keeps the checkpoint that the run begins with from being deleted by its own run."""
    storage, uri = config.storage, config.run.initialise_from
    assert uri is not None
    return lease(storage.locate(uri))


def _exported(config: Config, run: Location, session: str) -> Exported:
    spot, on_demand = config.cost.spot_per_gpu_hour, config.cost.on_demand_per_gpu_hour
    price = on_demand if spot is None else spot
    return Exported(run, session, config.optimisation.batch_size, price)


def _measuring(
    config: Config, run: Location, session: str
) -> contextlib.AbstractContextManager[object]:
    """What measures the run's checkpoints, if it is to be done; checks that it can be."""
    if config.evaluation.fid is None:
        return contextlib.nullcontext()
    # Not above: Ray Train's controller needn't wait for it.
    from cat_ray.evaluation.beside import check, measuring

    check(config, run)
    return measuring(config, run, session)


def _stopping(run: Location) -> contextlib.AbstractContextManager[None]:
    """A stop signal makes the workers save and stop; a second one ends the command at once."""

    def save(name: str) -> None:
        logger.warning("%s: saving, then stopping; once more to stop at once", name)
        try:
            # As long as the run goes on: while the storage is down no worker can read it.
            ask_to_stop(run.retried(math.inf))
        except ExpectedError as error:
            logger.warning("the workers can't be asked to save: %s", error)

    return stoppable(save)


def cluster(config: Config) -> contextlib.AbstractContextManager[None]:
    """The cluster that a job runs on."""
    workers = config.workers
    needed = workers.maximum * workers.cpus_per_worker + CPUS_PER_READ
    return connected(needed, elasticity.JOB_ENVIRONMENT)
