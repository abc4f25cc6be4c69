"""Run by test_hand_over.py in each process: two workers leave, the others save for them."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed

from cat_ray.checkpoint.layout import State
from cat_ray.checkpoint.write import CheckpointWriter
from cat_ray.config import dump, parse
from cat_ray.storage import locate
from cat_ray.training.engines import choose_device
from cat_ray.training.hand_over import hand_over
from cat_ray.training.preemption import partners
from cat_ray.training.state import make_state, state_slices

LEAVING = frozenset({0, 2})


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    config = parse((folder / "job.yaml").read_text(), "job")
    state = make_state(config, choose_device(), None)
    adversaries = state.adversaries
    probe_engines(adversaries, config)
    slices = state_slices(state)
    place = State(16, 0, "", dump(config), {})

    def save(name: str, parts: dict) -> None:
        run = locate(str(folder / name))
        writers = [
            (CheckpointWriter(run, "group", owner, world_size), part)
            for owner, part in parts.items()
        ]
        for writer, part in writers:
            writer.save(place, part)
        for writer, _ in writers:
            writer.wait()

    save("all", {rank: slices})
    distributed.barrier()
    taken = hand_over(slices, partners(world_size, LEAVING))
    if rank in LEAVING:
        # The machine is gone, without a word to anybody.
        os._exit(0)
    save("staying", {rank: slices, **taken})
    os._exit(0)


def probe_engines(adversaries, config) -> None:
    """One step, which makes the optimisers' state."""
    label = torch.zeros(1, dtype=torch.long)
    z = torch.randn(1, config.model.generator.latent_width)
    adversaries.generator.descend(adversaries.generator(z, label).square().mean() / 3)
    pyramid = [torch.randn(1, config.model.channels, s, s) for s in config.model.scales()]
    logits, _ = adversaries.discriminator(pyramid, label, 0)
    adversaries.discriminator.descend(logits.square().mean() / 3)


if __name__ == "__main__":
    main()
