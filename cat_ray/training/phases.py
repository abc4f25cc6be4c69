"""Trains a job: one run, or the runs of its schedule one after the other."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise

from cat_ray.checkpoint.layout import images_of
from cat_ray.checkpoint.read import newest
from cat_ray.checkpoint.transfer import Transfer
from cat_ray.config import Config
from cat_ray.errors import BadInput
from cat_ray.operations.identity import CONFIG_NAME, check_same
from cat_ray.operations.outcome import outcome_written
from cat_ray.schedule import phases
from cat_ray.storage import Location
from cat_ray.training.beginning import check_beginning, pinned, rules_between
from cat_ray.training.driver import train

logger = logging.getLogger(__name__)


def train_job(config: Config) -> Location:
    """Trains all that is left to do of a job; as `driver.train`, and the report is the last run's.

    Phases that were trained to their end are passed over. That each can go on from the one before
    is checked before the first begins.
    """
    if not config.schedule:
        return train(config)
    runs = phases(config)
    check_transitions(runs)
    # Before any folder is written.
    with _named(1):
        check_beginning(runs[0], _location(runs[0]))
    folder = _location(config)
    if (folder / CONFIG_NAME).exists():
        raise BadInput(f"{folder.uri} holds a run without phases: choose another run.folder")
    for run in runs:
        if (_location(run) / CONFIG_NAME).exists():
            check_same(_location(run), pinned(run, _location(run)))
    report = None
    with outcome_written(folder, lambda: _images(runs)):
        for number, run in enumerate(runs, start=1):
            told = f"phase {number} of {len(runs)}, {run.run.total_images:,} images"
            if number < len(runs) and _images([run]) >= run.run.total_images:
                logger.warning("%s: was trained to its end before", told)
                continue
            logger.warning("%s, in %s", told, run.run.folder)
            report = train(run)
    assert report is not None
    return report


def check_transitions(runs: Sequence[Config]) -> tuple[Transfer, ...]:
    """The rules by which each phase but the first goes on from the one before.

    Raises:
        BadInput: one can't.
    """
    found = []
    for number, (before, after) in enumerate(pairwise(runs), start=2):
        with _named(number):
            found.append(rules_between(before, after))
    return tuple(found)


@contextlib.contextmanager
def _named(number: int) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        raise BadInput(f"phase {number} of schedule: {error}") from error


def _location(config: Config) -> Location:
    return config.storage.locate(config.run.folder)


def _images(runs: Sequence[Config]) -> int:
    found = [newest(_location(run)) for run in runs]
    return sum(images_of(checkpoint.name) for checkpoint in found if checkpoint)
