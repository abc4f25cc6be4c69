"""A worker's part of a batch in the parts that go through the networks at once."""

from collections.abc import Sequence

import torch

from cat_ray.config import Config
from cat_ray.data.read import Batch
from cat_ray.training.draws import draw_step
from cat_ray.training.placement import to_device
from cat_ray.training.reals import RealsMaker
from cat_ray.training.steps import MicroBatch


def micro_batches_of(
    config: Config,
    batch: Batch,
    parts: Sequence[range],
    step: int,
    reals: RealsMaker,
    device: torch.device,
    noise_stream: int = 0,
) -> list[MicroBatch]:
    """The images of a worker's lanes with the random numbers of a step, on the device.

    `parts` are the lanes of each micro-batch, see `lanes.micro_batches`.
    """
    size, first = config.optimisation.lane_size, parts[0].start
    made = []
    for lanes in parts:
        rows = batch.rows((lanes.start - first) * size, (lanes.stop - first) * size)
        draws = draw_step(config, lanes, step, device, noise_stream, posterior=reals.are_latents)
        labels = to_device(torch.from_numpy(rows.labels), device)
        last = lanes == parts[-1]
        made.append(MicroBatch(reals(rows, draws.posterior), labels, draws, last))
    return made
