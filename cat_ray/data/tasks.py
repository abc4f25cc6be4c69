"""A Ray Data job of one task for each row: what `prepare` and `index` have in common."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.data

from cat_ray.training.elasticity import told_to_user

Row = dict[str, Any]


def run_tasks(
    task: Callable[..., Row], rows: Sequence[Row], cpus: float, **settings: Any
) -> Iterator[Row]:
    """Does a task for each row, as many at a time as there are CPUs for; results as they come.

    Args:
        task: takes a row and the settings.
        rows: one for each task.
        cpus: that a task takes.
        settings: the same for all.

    Raises:
        BadInput: a task raised it.
    """
    dataset = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(
        task, fn_kwargs=settings, num_cpus=cpus
    )
    yield from rows_of(dataset)


def rows_of(dataset: ray.data.Dataset) -> Iterator[Row]:
    """A data set's rows as they come.

    Raises:
        BadInput: a task raised it.
    """
    dataset.context.enable_progress_bars = False
    dataset.context.raise_original_map_exception = True
    try:
        yield from dataset.iter_rows()
    except ray.exceptions.RayError as error:
        if (told := told_to_user(error)) is not None:
            raise told from error
        raise
