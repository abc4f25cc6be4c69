"""Run by test_reshard.py in each process: makes or loads one state after another and saves it."""

import gc
import json
import sys
from pathlib import Path

import safetensors.torch
from engine_steps import CPU, save, step
from torch import distributed

from cat_ray.checkpoint.read import resolve
from cat_ray.config import parse
from cat_ray.storage import locate
from cat_ray.training.state import make_state

NETWORKS = ("generator", "discriminator")


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    distributed.init_process_group("gloo")
    text = (folder / "job.yaml").read_text()
    batches = safetensors.torch.load_file(folder / "batches.safetensors")
    for place, case in enumerate(json.loads(sys.argv[3])):
        stages = [f"optimisation.{name}.zero_stage={case['stage']}" for name in NETWORKS]
        config = parse(text, "job", stages)
        source = resolve(locate(f"{folder}/{case['source']}")) if case["source"] else None
        state = make_state(config, CPU, source)
        if place == 0:
            # By now all modules are loaded. DeepSpeed collects garbage with every engine, and
            # looking through them each time would take longer than all else.
            gc.freeze()
        for at in range(steps if source else 0, steps):
            step(state, config, batches["images"][at], batches["labels"][at], at)
        place, images = f"{folder}/{case['name']}", config.optimisation.batch_size
        save(state, locate(place), steps * images)
        if case["next"]:
            step(state, config, batches["images"][steps], batches["labels"][steps], steps)
            save(state, locate(f"{place}-next"), (steps + 1) * images)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
