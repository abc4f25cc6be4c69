"""What each Ray Train worker runs."""

from typing import Any

import ray.train

from cat_ray.config import parse
from cat_ray.data.stream import DATASET_NAME, RankStream
from cat_ray.training.faults import Injector
from cat_ray.training.loop import train
from cat_ray.training.process import set_threads
from cat_ray.training.session import Session


def work(settings: dict[str, Any]) -> None:
    """Sets up this worker's session and trains to the end of the run.

    Args:
        settings: `config`, the resolved configuration as YAML, `session`, the name of this call of
            the driver, and `faults`, those of a drill.
    """
    stream: Any = ray.train.get_dataset_shard(DATASET_NAME)
    assert isinstance(stream, RankStream)
    config = parse(settings["config"], "config")
    set_threads(config.workers)
    run = config.storage.locate(config.run.folder)
    injector = Injector(run, settings["faults"], ray.train.get_context().get_world_rank())
    with Session(config, stream, settings["session"], injector) as session:
        train(session)
