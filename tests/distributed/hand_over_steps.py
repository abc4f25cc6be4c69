"""Run by test_hand_over.py in each process: two workers leave, the others save for them."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed

from cat_ray.config import parse
from cat_ray.data.index import Index, Shard
from cat_ray.data.order import Stream
from cat_ray.data.stream import Due, reading_of
from cat_ray.storage import locate
from cat_ray.training import saver as saver_module
from cat_ray.training.agreement import Agreement
from cat_ray.training.engines import choose_device
from cat_ray.training.saver import Saver
from cat_ray.training.state import make_state

LEAVING = frozenset({0, 2})


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    config = parse((folder / "job.yaml").read_text(), "job")
    state = make_state(config, choose_device(), None)
    adversaries = state.adversaries
    probe_engines(adversaries, config)
    index = Index("images", 32, 1, (16,), "", (Shard("train.tar", 16, 1, ""),), "")
    due = Due(
        stream=Stream(seed=0, counts=(16,), block_images=16, batch_size=16, lanes=4),
        start=0,
        stop=16,
        window_bytes=16,
        checkpoint=None,
        worker_group="3f9a1c",
        began=0.0,
        noise_stream=0,
        gone_nodes=(),
        index=index,
        reading=reading_of(config, index, locate(str(folder))),
    )

    def saver(name: str) -> Saver:
        return Saver(config, locate(str(folder / name)), due, state, Agreement())

    everybody = saver("all")
    everybody.save(16)
    everybody.wait()
    distributed.barrier()
    if distributed.get_rank() in LEAVING:
        # The machine goes while this worker waits for the others, without a word to anybody.
        saver_module.time.sleep = lambda _: os._exit(0)
    saver("staying").save_for_leaving(16, LEAVING)
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
