"""What each Ray Train worker runs."""

from typing import Any

import ray.train

from cat_ray.config import parse
from cat_ray.data.stream import DATASET_NAME, RankStream
from cat_ray.training.loop import train
from cat_ray.training.session import Session


def work(settings: dict[str, Any]) -> None:
    """Sets up this worker's session and trains to the end of the run.

    Args:
        settings: `config`, the resolved configuration as YAML, and `session`, the name of this
            call of the driver.
    """
    stream: Any = ray.train.get_dataset_shard(DATASET_NAME)
    assert isinstance(stream, RankStream)
    session = Session(parse(settings["config"], "config"), stream, settings["session"])
    train(session)
    session.close()
