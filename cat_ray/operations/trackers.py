"""Weights & Biases and MLflow as mirrors of a run's figures.

Servers, projects and keys come from the environment (`WANDB_*`, `MLFLOW_*`), never from here.
"""

import logging
import os
from collections.abc import Iterable
from typing import Protocol

from cat_ray.errors import BadInput
from cat_ray.storage import Location

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes figures as they come; the number of images seen is the step."""

    def log(self, kind: str, images: int, values: dict[str, float]) -> None:
        """Writes each value as `kind/name`."""
        ...

    def close(self) -> None:
        """Ends the tracker's run, which a later session goes on with."""
        ...


def start_trackers(names: Iterable[str], run: Location) -> tuple[Tracker, ...]:
    """Starts the trackers named, or goes on with their runs of this run folder.

    A tracker's run id lies in the run folder as `<name>.run_id`, so that it has the life of the
    run: whoever goes on with the folder goes on with the id, a folder begun anew gets a new one.

    Raises:
        BadInput: a package is missing, or its server refuses.
    """
    return tuple(TRACKERS[name](run) for name in dict.fromkeys(names))


class WandbTracker:
    """A W&B run. Steps that W&B has already are kept as they are, it can't take them back."""

    def __init__(self, run: Location):
        try:
            # By name: a bare `import wandb` would take the folder that W&B writes to for it.
            from wandb import Error, init
        except ImportError as error:
            raise _missing("wandb") from error
        place = run / "wandb.run_id"
        known = _known(place)
        name = None if known else os.environ.get("WANDB_NAME", run.name)
        try:
            self._run = init(id=known, resume="allow", name=name)
        except Error as error:
            raise BadInput(f"W&B doesn't start: {error}") from error
        place.write(self._run.id.encode())

    def log(self, kind: str, images: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(_titled(kind, values), step=images)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class MlflowTracker:
    """An MLflow run. Work done again after a failure gives second points at the same steps.

    A server that fails later on is a warning and costs points, not the training.
    """

    def __init__(self, run: Location):
        try:
            import mlflow
        except ImportError as error:
            raise _missing("mlflow") from error
        self._mlflow = mlflow
        place = run / "mlflow.run_id"
        known = _known(place)
        try:
            started = mlflow.start_run(run_id=known, run_name=None if known else run.name)
        except mlflow.MlflowException as error:
            hint = f"; to begin a new MLflow run delete {place.uri}" if known else ""
            raise BadInput(
                f"MLflow doesn't start at {mlflow.get_tracking_uri()}: {error}{hint}"
            ) from error
        self._run_id = started.info.run_id
        place.write(self._run_id.encode())

    def log(self, kind: str, images: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        try:
            self._mlflow.log_metrics(_titled(kind, values), step=images, run_id=self._run_id)
        except self._mlflow.MlflowException as error:
            logger.warning("MLflow didn't take the figures at %d images: %s", images, error)

    def close(self) -> None:
        """See `Tracker`."""
        try:
            self._mlflow.end_run()
        except self._mlflow.MlflowException as error:
            logger.warning("MLflow didn't take the end of the run: %s", error)


TRACKERS: dict[str, type[WandbTracker] | type[MlflowTracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


def _missing(package: str) -> BadInput:
    return BadInput(
        f"reporting.trackers names {package}, which isn't installed: pip install '.[{package}]'"
    )


def _known(place: Location) -> str | None:
    return place.read().decode() if place.exists() else None


def _titled(kind: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in values.items()}
