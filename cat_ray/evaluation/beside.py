"""Measures a run's checkpoints while it is trained, on what the training leaves.

Ray Train's own validation tasks take checkpoints that go through its reports, which ours, made of
many workers' parts, don't; else they are the same: a task for each checkpoint, one at a time, that
the training never waits for.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import ray
from ray.exceptions import RayError

from cat_ray.checkpoint.layout import checkpoint_folders, images_of, read_whole
from cat_ray.checkpoint.retain import lease, write_best
from cat_ray.config import Config
from cat_ray.errors import BadInput, RunFailed, StorageDown, StorageFull
from cat_ray.evaluation.fid import fid
from cat_ray.evaluation.fid_plan import planned_reals
from cat_ray.evaluation.measurement import (
    BesideTraining,
    Measurement,
    Output,
    Samples,
    Workers,
)
from cat_ray.evaluation.result import FRECHET, Result, differences, read_result
from cat_ray.evaluation.sample_plan import LEASE_SECONDS
from cat_ray.evaluation.workers import begin_work
from cat_ray.operations.journal import MEASURED, Journal
from cat_ray.operations.telling import Tell, Telling, at_once
from cat_ray.ray_errors import TASK_ADVICE, described
from cat_ray.storage import Location
from cat_ray.training.elasticity import told_to_user
from cat_ray.training.requests import stop_is_asked

RESULTS = "fid"
LOCAL_POLL_SECONDS, REMOTE_POLL_SECONDS = 1.0, 10.0

logger = logging.getLogger(__name__)


def next_due(saved: Sequence[int], measured: Sequence[int], every: int, total: int) -> int | None:
    """Which checkpoint is to be measured next, by its images: of the newest interval the first.

    What was overtaken by a newer interval is left out, so that a slow measurement falls behind by
    one at most.

    Args:
        saved: images of the checkpoints that are there.
        measured: of those that were measured, or tried.
        every: images of an interval.
        total: images of the whole run; its last checkpoint is always due.
    """
    if total in saved:
        return None if total in measured else total
    done = max((images // every for images in measured), default=0)
    newest = max((images // every for images in saved), default=0)
    if newest <= done:
        return None
    return min(images for images in saved if images // every == newest)


def measurement(
    config: Config, asked: BesideTraining, run: Location, checkpoint: str
) -> Measurement:
    """The job that measures one of a run's checkpoints."""
    return Measurement(
        samples=Samples(checkpoint=checkpoint, **asked.samples.model_dump()),
        features=asked.features,
        reference=asked.reference or config.data.shards,
        output=Output(folder=(run / RESULTS).uri),
        latents=config.latents,
        storage=config.storage,
        workers=asked.workers,
    )


def check(config: Config, run: Location) -> None:
    """Makes sure that a run's checkpoints will be measurable, before hours of training.

    Raises:
        BadInput: the weights or the reference can't be used, or aren't for such a run.
    """
    asked = config.evaluation.fid
    assert asked is not None
    try:
        planned_reals(measurement(config, asked, run, run.uri), config)
    except BadInput as error:
        raise BadInput(f"evaluation.fid: {error}") from error


def results(run: Location) -> Iterator[Result]:
    """All that was measured of a run's checkpoints."""
    for name in sorted((run / RESULTS).sizes()):
        if name.endswith(".json"):
            yield read_result(run / RESULTS / name)


def worker_seconds(result: Result, workers: Workers) -> float:
    """What a measurement took of the cluster; nothing where it took only what was left."""
    return 0.0 if workers.spare else workers.count * sum(result.seconds.values())


@contextmanager
def measuring(config: Config, run: Location, session: str) -> Iterator[None]:
    """Measures a run's checkpoints for as long as the block lasts; see `Measuring`."""
    telling = Telling()
    try:
        with Measuring(config, run, session, telling.put):
            yield
    finally:
        telling.close(config.storage.retry_seconds)


class Measuring:
    """Measures from a thread, one checkpoint after the other, for as long as the block lasts.

    A block that ends well waits for the last checkpoint's result, unless the run is asked to stop.
    `tell` writes down what was measured.
    """

    def __init__(self, config: Config, run: Location, session: str, tell: Tell = at_once):
        asked = config.evaluation.fid
        assert asked is not None
        self._config, self._asked, self._run, self._session = config, asked, run, session
        self._tell = tell
        self._tried = [result.subject["images"] for result in results(run)]
        self._ended, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="measuring", daemon=True)

    def __enter__(self) -> "Measuring":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._given_up.set()
        self._ended.set()
        while self._thread.is_alive():
            self._thread.join(LOCAL_POLL_SECONDS)
            if stop_is_asked(self._run):
                self._given_up.set()

    def _follow(self) -> None:
        seconds = LOCAL_POLL_SECONDS if self._run.local_path else REMOTE_POLL_SECONDS
        while not self._given_up.is_set():
            # Asked before the look: what was saved until then is seen.
            ended, checkpoint = self._ended.wait(seconds), None
            try:
                checkpoint = self._due()
                if checkpoint is not None:
                    logger.warning("%s is being measured, beside the training", checkpoint.name)
                    self._measure(checkpoint)
                    self._tried.append(images_of(checkpoint.name))
                elif ended:
                    return
            except (StorageDown, StorageFull) as error:
                # It is measured later.
                logger.warning("not measured yet: %s", error)
                if ended:
                    return
            except (BadInput, RunFailed) as error:
                # The training goes on, and says itself what is wrong with its storage.
                logger.warning("not measured: %s", error)
                if checkpoint is not None:
                    self._tried.append(images_of(checkpoint.name))
                elif ended:
                    return

    def _due(self) -> Location | None:
        folders = {images_of(folder.name): folder for folder in checkpoint_folders(self._run)}
        every, total = self._asked.every_images, self._config.run.total_images
        images = next_due(list(folders), self._tried, every, total)
        if images is None or read_whole(folders[images]) is None:
            return None
        return folders[images]

    def _measure(self, checkpoint: Location) -> None:
        job = measurement(self._config, self._asked, self._run, checkpoint.uri)
        # Longer than the measurement's own: what turns out to be the best must not go meanwhile.
        with lease(checkpoint, LEASE_SECONDS):
            task = ray.remote(num_cpus=0, max_calls=1)(_in_task).remote(job)
            while not ray.wait([task], timeout=LOCAL_POLL_SECONDS)[0]:
                if self._given_up.is_set():
                    ray.cancel(task)
                    return
            try:
                result = ray.get(task)
            except RayError as error:
                told = told_to_user(error)
                if isinstance(told, (StorageDown, StorageFull)):
                    raise told from error
                told = told or described(error, TASK_ADVICE)
                raise RunFailed(f"{checkpoint.uri}: {told}") from error
            best = self._best(result)
            write_best(self._run, best)
        self._write(checkpoint, result, best)

    def _write(self, checkpoint: Location, result: Result, best: list[str]) -> None:
        figures = dict(result.figures)
        # By its own name, so that nothing is called an FID that is none.
        figures = {result.metric: figures.pop(FRECHET), **figures}
        # Not earlier: TensorBoard's import takes a while.
        journal = Journal(self._run, self._session, None, file=MEASURED, tell=self._tell)
        journal.append(
            "measured",
            result.subject["images"],
            metric=result.metric,
            checkpoint=checkpoint.name,
            best=best,
            worker_seconds=worker_seconds(result, self._asked.workers),
            **figures,
        )
        journal.close()

    def _best(self, newest: Result) -> list[str]:
        """The checkpoints with the least distances that may be compared with the newest one."""
        there = {folder.name for folder in checkpoint_folders(self._run)}
        known = {
            result.subject["checkpoint"].rsplit("/", 1)[-1]: result.figures[FRECHET]
            for result in results(self._run)
            if not any(differences(result, newest))
        }
        standing = sorted(known.keys() & there, key=lambda name: known[name])
        return standing[: self._asked.keep_best]


def _in_task(job: Measurement) -> Result:
    begin_work(job.workers.model_copy(update={"gpu": False}))
    return fid(job)[0]
