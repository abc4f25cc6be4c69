"""Run by test_same_curve.py: `cat-ray`, with steps that meet a NaN.

`nan_steps.py STREAM@IMAGES,... train job.yaml`: on the last worker, in the step that ends at so
many images, the reals are NaN as long as the run draws this noise stream.
"""

import sys
from dataclasses import replace
from typing import Any

from cat_ray.cli import app
from cat_ray.training import driver, session, worker

BAD = {tuple(int(part) for part in each.split("@")) for each in sys.argv.pop(1).split(",")}


def work(settings: dict[str, Any]) -> None:
    """What each worker runs; Ray brings it there by value, for no worker can import this file."""
    unspoilt = session.Session.micro_batches

    def spoilt(self: session.Session, batch: Any) -> Any:
        made = unspoilt(self, batch)
        ends = self.images + self.config.optimisation.batch_size
        last = self.lanes.stop == self.config.optimisation.lanes
        if last and (self.noise_stream, ends) in BAD:
            images = made[0].reals.images * float("nan")
            made[0] = replace(made[0], reals=replace(made[0].reals, images=images))
        return made

    session.Session.micro_batches = spoilt
    worker.work(settings)


driver.work = work
app()
