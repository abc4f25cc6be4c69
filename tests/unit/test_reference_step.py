"""The reference order's step is ours: the same gradients of both networks."""

import math

import pytest
import torch
from torch import Tensor, nn

from cat_ray.config import Config, parse
from cat_ray.operations.plain_training import PlainEngine, plain_state
from cat_ray.operations.reference_step import reference_step
from cat_ray.operations.step_times import steps_on_random_data
from cat_ray.training.steps import training_step

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# A GPU's products of large matrices are added up in an order that depends on their size.
TOLERANCE = {"cpu": 1e-6, "cuda": 3e-6}


def gradients_of(config: Config, step, device: torch.device) -> dict[str, Tensor]:
    """Of every parameter, in the first step; PyTorch only."""
    state = plain_state(config, device)
    found: dict[str, Tensor] = {}
    for name in ("generator", "discriminator"):
        engine = getattr(state.adversaries, name)
        assert isinstance(engine, PlainEngine)
        keep(name, engine.module, found)
    steps_on_random_data(config, state, device, step)(0)
    return found


def keep(name: str, network: nn.Module, found: dict[str, Tensor]) -> None:
    for key, parameter in network.named_parameters():

        def note(held: Tensor, key: str = f"{name}.{key}") -> None:
            assert held.grad is not None
            found[key] = held.grad.clone()

        parameter.register_post_accumulate_grad_hook(note)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_reference_order_has_the_gradients_of_our_step(tiny_job, share, device):
    changes = (
        f"objective.penalty={{share: {share}, weight: 0.1}}",
        "optimisation.lanes=2",
        "optimisation.precision=fp32",
    )
    place = torch.device(device)
    config = parse(tiny_job, "job", changes)
    assert config.penalised_per_lane() == math.ceil(8 * share)
    ours, theirs = (gradients_of(config, step, place) for step in (training_step, reference_step))
    assert ours.keys() == theirs.keys()
    state = plain_state(config, place)
    for name in ("generator", "discriminator"):
        network = getattr(state.adversaries, name).module
        keys = [f"{name}.{key}" for key, _ in network.named_parameters()]
        mine, other = (torch.cat([g[key].flatten() for key in keys]) for g in (ours, theirs))
        difference = float((mine - other).norm() / other.norm())
        print(f"{device}: {name}, share {share}: relative difference {difference:.1e}")
        assert difference < TOLERANCE[device]
