"""The driver: checks everything before a worker starts, then hands over to Ray Train."""

import contextlib
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from cat_ray.checkpoint.read import newest, read_state
from cat_ray.config import Config, dump
from cat_ray.data.index import INDEX_NAME, Index, check_fits, check_shards, read_index
from cat_ray.data.order import Stream
from cat_ray.data.prepare import prepare
from cat_ray.data.stream import CPUS_PER_READ, DATASET_NAME, Due, LaneDataConfig
from cat_ray.errors import BadInput
from cat_ray.operations.identity import claim
from cat_ray.operations.progress import Progress
from cat_ray.operations.report import write_report
from cat_ray.storage import ENVIRONMENT, Location, locate
from cat_ray.training.worker import REFUSED, work

RAY_FOLDER = "ray"


def train(config: Config) -> Location:
    """Runs a job to its end, from the newest complete checkpoint if its folder has one.

    Returns:
        Where the report is.

    Raises:
        BadInput: something in the job, the data or the storage can't be used.
        TrainingFailedError: training failed more often than the configuration allows.
    """
    storage = config.storage
    run = locate(config.run.folder, storage.endpoint_url, storage.region)
    shards = locate(config.data.shards, storage.endpoint_url, storage.region)
    index = _checked_index(config, shards)
    config = _at(config, run, shards)
    claim(run, config, index.digest())

    batch_size = config.optimisation.batch_size

    def still_due() -> Due:
        # Ray Train calls this in its controller whenever a worker group starts: here, and only
        # here, it is decided which checkpoint all workers go on from.
        if (run / REFUSED).exists():
            raise BadInput((run / REFUSED).read().decode())
        check_shards(index, shards)
        checkpoint = newest(run)
        return Due(
            stream=Stream(
                seed=config.run.seed,
                counts=tuple(shard.count for shard in index.shards),
                batch_size=batch_size,
                lanes=config.optimisation.lanes,
            ),
            start=read_state(checkpoint).images if checkpoint else 0,
            stop=config.run.total_images,
            window=max(1, config.data.window_images // batch_size) * batch_size,
            checkpoint=checkpoint.uri if checkpoint else None,
            index=index,
            folder=shards,
            num_classes=config.data.num_classes,
        )

    (run / REFUSED).delete()
    session = uuid.uuid4().hex[:8]
    if still_due().start < config.run.total_images:
        with _cluster(config), Progress(run, session, config.run.total_images):
            _fit(config, run, session, still_due)
    return write_report(run)


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
        prepare(config.data.source, shards)
    index = read_index(shards)
    check_fits(index, config.model.resolution, config.model.channels, config.data.num_classes)
    check_shards(index, shards)
    return index


def _fit(config: Config, run: Location, session: str, still_due: Callable[[], Due]) -> None:
    workers = config.workers
    trainer = TorchTrainer(
        work,
        train_loop_config={"config": dump(config), "session": session},
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(workers.minimum, workers.maximum),
            use_gpu=workers.gpu,
            resources_per_worker={
                "CPU": workers.cpus_per_worker,
                **({"GPU": 1} if workers.gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=run.path,
            storage_filesystem=run.filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
        datasets={DATASET_NAME: still_due},  # pyright: ignore[reportArgumentType]
        dataset_config=LaneDataConfig(),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        told = _bad_input(error)
        if told is None:
            raise
        raise told from error


def _bad_input(error: TrainingFailedError) -> BadInput | None:
    """The message for the user that a failure carries somewhere inside, if it does."""
    waiting: list[BaseException | None] = [error]
    if isinstance(error, WorkerGroupError):
        waiting.extend(error.worker_failures.values())
    elif isinstance(error, ControllerError):
        waiting.append(error.controller_failure)
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, BadInput):
            return inner
        if inner is not None:
            waiting.extend([inner.__cause__, getattr(inner, "cause", None)])
    return None


@contextlib.contextmanager
def _cluster(config: Config) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS, or to one started here for as long as needed."""
    logging.getLogger("ray").setLevel(logging.WARNING)
    own = not ray.is_initialized()
    if own and "RAY_ADDRESS" in os.environ:
        ray.init(
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": ENVIRONMENT},
        )
    elif own:
        workers = config.workers
        needed = math.ceil(workers.maximum * workers.cpus_per_worker + CPUS_PER_READ)
        ray.init(
            num_cpus=max(os.cpu_count() or 1, needed),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        if own:
            ray.shutdown()
