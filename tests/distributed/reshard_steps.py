"""Run by test_reshard.py in each process: saves at every ZeRO stage, or loads what others saved."""

import json
import sys
from pathlib import Path

import safetensors.torch
from engine_steps import CPU, save, step
from torch import distributed

from cat_ray.checkpoint.read import newest
from cat_ray.config import parse
from cat_ray.storage import locate
from cat_ray.training.state import make_state


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    distributed.init_process_group("gloo")
    text = (folder / "job.yaml").read_text()
    batches = safetensors.torch.load_file(folder / "batches.safetensors")
    for name, zero_stage, source in json.loads(sys.argv[3]):
        stages = [
            f"optimisation.{n}.zero_stage={zero_stage}" for n in ("generator", "discriminator")
        ]
        config = parse(text, "job", stages)
        state = make_state(config, CPU, newest(locate(f"{folder}/{source}")) if source else None)
        for at in range(0 if source is None else steps, steps):
            step(state, config, batches["images"][at], batches["labels"][at], at)
        save(state, locate(f"{folder}/{name}"), steps * config.optimisation.batch_size)
        # The same step for all: it shows whether the optimisers know how many they have taken.
        step(state, config, batches["images"][steps], batches["labels"][steps], steps)
        save(state, locate(f"{folder}/{name}-next"), (steps + 1) * config.optimisation.batch_size)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
