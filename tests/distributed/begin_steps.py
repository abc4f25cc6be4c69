"""Run by test_begin.py in each process: begins with a checkpoint's weights at some ZeRO stages."""

import sys
from pathlib import Path

import torch
from engine_steps import CPU, differs, held, step
from torch import Tensor, distributed, nn

from cat_ray.checkpoint.layout import DISCRIMINATOR, GENERATOR, average_group
from cat_ray.config import parse
from cat_ray.training.beginning import initial_weights
from cat_ray.training.engines import local_values
from cat_ray.training.state import make_state

NETWORKS = ("generator", "discriminator")


def check_held(network: nn.Module, expected: dict[str, Tensor]) -> None:
    """What this process holds of the weights is its part of the expected ones."""
    for name, parameter in network.named_parameters():
        own, whole = local_values(parameter).flatten(), expected[name].flatten()
        start = distributed.get_rank() * len(own) if len(own) < len(whole) else 0
        part = whole[start : start + len(own)]
        # The last one is padded.
        assert torch.equal(own[: len(part)], part), name


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    text = (folder / "job.yaml").read_text()
    for stage in (1, 3):
        config = parse(
            text, "job", [f"optimisation.{name}.zero_stage={stage}" for name in NETWORKS]
        )
        state, expected = make_state(config, CPU, None), initial_weights(config)
        engines = state.adversaries
        check_held(engines.generator.module, expected[GENERATOR])
        check_held(engines.discriminator.module, expected[DISCRIMINATOR])
        for decay in config.optimisation.ema_decays:
            with state.averages.applied(decay) as averaged:
                check_held(averaged, expected[average_group(decay)])
        before = held(engines.generator.module)
        side, batch = config.model.resolution, config.optimisation.batch_size
        images = torch.rand(batch, config.model.channels, side, side) * 2 - 1
        step(state, config, images, torch.arange(batch) % config.data.num_classes, 0)
        assert differs(before, held(engines.generator.module))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
