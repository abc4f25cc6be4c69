"""A run's workers begin with another run's weights, each with its part of them, at every stage."""

from pathlib import Path

import torch

from cat_ray.checkpoint.layout import DISCRIMINATOR, GENERATOR, State, average_group
from cat_ray.config import dump, parse
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.storage import locate

SCRIPT = Path(__file__).with_name("begin_steps.py")
# Odd sizes: a worker's part may be padded.
SMALL = (
    "model.resolution=8",
    "model.stages=2",
    "model.generator={size: {depth: 2, width: 20, heads: 1}, patch: 2, latent_width: 7}",
    "model.discriminator={size: {depth: 1, width: 28, heads: 1}, patch: 1, projection_width: 9}",
    "data.num_classes=5",
)
LARGER = ("model.resolution=16", "model.generator.patch=4", "model.discriminator.patch=2")


def test_each_worker_begins_with_its_part_of_the_weights(
    tmp_path: Path, tiny_job: str, save_checkpoint, run_group
) -> None:
    config = parse(tiny_job, "job", SMALL)
    groups = {}
    for seed, (group, build) in enumerate(
        {
            GENERATOR: build_generator,
            DISCRIMINATOR: build_discriminator,
            average_group(0.9): build_generator,
        }.items()
    ):
        torch.manual_seed(seed)
        groups[group] = build(config).state_dict()
    place = save_checkpoint(locate(f"{tmp_path}/old"), State(32, 0, "", dump(config), {}), groups)
    begun = parse(tiny_job, "job", [*SMALL, *LARGER, f"run.initialise_from={place.uri}"])
    (tmp_path / "job.yaml").write_text(dump(begun))
    run_group(SCRIPT, 2, str(tmp_path))
