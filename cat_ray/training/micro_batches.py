"""A worker's part of a batch in the parts that go through the networks at once."""

import torch

from cat_ray.config import Config
from cat_ray.data.read import Batch
from cat_ray.training.draws import draw_step
from cat_ray.training.lanes import micro_batches
from cat_ray.training.placement import to_device
from cat_ray.training.reals import RealsMaker
from cat_ray.training.steps import MicroBatch


def micro_batches_of(
    config: Config,
    batch: Batch,
    lanes: range,
    step: int,
    reals: RealsMaker,
    device: torch.device,
    noise_stream: int = 0,
) -> list[MicroBatch]:
    """The images of some lanes with the random numbers of a step, on the device."""
    size = config.optimisation.lane_size
    made = []
    for each in micro_batches(lanes, config.optimisation.micro_batch_lanes):
        rows = batch.rows((each.start - lanes.start) * size, (each.stop - lanes.start) * size)
        draws = draw_step(config, each, step, device, noise_stream, posterior=reals.are_latents)
        labels = to_device(torch.from_numpy(rows.labels), device)
        last = each.stop == lanes.stop
        made.append(MicroBatch(reals(rows, draws.posterior), labels, draws, last))
    return made
