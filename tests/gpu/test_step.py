"""The step on a GPU: it waits for nothing, repeats bit by bit, and engines take plain steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from cat_ray.config import Config, parse
from cat_ray.operations.plain_training import plain_state
from cat_ray.operations.step_times import steps_on_random_data
from cat_ray.training.engines import Engine, choose_device
from cat_ray.training.state import TrainingState, make_state
from cat_ray.training.steps import training_step

pytestmark = pytest.mark.gpu

STEPS = 3
# What test_engines.py allows on the CPU.
TOLERANCE, IN_PARTS_TOLERANCE = 1e-6, 3e-6

FP32 = "optimisation.precision=fp32"
CHECKPOINTING = "optimisation.activation_checkpointing=true"
MICRO_BATCHES = "optimisation.micro_batch_lanes=2"


def both(**settings: str | float) -> tuple[str, ...]:
    """The same settings for both engines."""
    networks = ("generator", "discriminator")
    return tuple(
        f"optimisation.{network}.{name}={value}"
        for network in networks
        for name, value in settings.items()
    )


SETTINGS = {
    **{f"zero{stage}": both(zero_stage=stage) for stage in range(4)},
    **{f"offload{stage}": both(zero_stage=stage, offload="optimiser") for stage in (1, 2, 3)},
    "offload-all": both(zero_stage=3, offload="all"),
    "micro-batches": (*both(zero_stage=1), MICRO_BATCHES),
    "everything": (*both(zero_stage=3, offload="all"), CHECKPOINTING, MICRO_BATCHES),
}


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """This process as a group of one, over NCCL."""
    device = choose_device()
    distributed.init_process_group(
        "nccl", store=distributed.HashStore(), rank=0, world_size=1, device_id=device
    )
    with pytest.MonkeyPatch.context() as environment:
        # DeepSpeed asks for it.
        environment.setenv("LOCAL_RANK", "0")
        yield
    distributed.destroy_process_group()


@pytest.fixture
def job(tiny_job: str, tiny_dinov2: Path) -> Callable[..., Config]:
    """The tiny job with every term of the loss and CAT-H's learning rate, changed."""
    alignment = f"objective.alignment={{weight: 1.0, teacher: {tiny_dinov2}, teacher_width: 32}}"
    rates = both(learning_rate=1.2e-4, width_aware="false")

    def changed(*changes: str) -> Config:
        return parse(tiny_job, "job", (alignment, *rates, *changes))

    return changed


def weights_after(config: Config, state: TrainingState) -> Tensor:
    """Every weight of both networks, flat, after some steps on the same batch."""
    take = steps_on_random_data(config, state, choose_device(), training_step)
    for place in range(STEPS):
        take(place)
    adversaries = state.adversaries
    held = []
    for engine in (adversaries.generator, adversaries.discriminator):
        if isinstance(engine, Engine):
            engine.release()
            held += [fragment.master.detach() for fragment in engine.fragments()]
        else:
            held += [value.detach().flatten() for value in engine.module.parameters()]
    return torch.cat([values.to("cpu", torch.float32) for values in held])


def plain_weights(config: Config) -> Tensor:
    """The same in plain PyTorch."""
    return weights_after(config, plain_state(config, choose_device()))


@contextmanager
def refusing_waits() -> Iterator[None]:
    """Makes an error of everything that waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (CHECKPOINTING,),
        (MICRO_BATCHES,),
        ("optimisation.compile=true",),
        ("objective.penalty.weight=0", "objective.consistency.weight=0"),
    ],
    ids=["default", "checkpointing", "micro-batches", "compiled", "no-penalty"],
)
def test_a_step_never_waits_for_the_gpu(
    job: Callable[..., Config], changes: tuple[str, ...]
) -> None:
    config, device = job(*changes), choose_device()
    take = steps_on_random_data(config, plain_state(config, device), device, training_step)
    # The first ones choose kernels and compile.
    for place in range(STEPS):
        take(place)
    with refusing_waits():
        take(STEPS)


def test_a_wait_is_told() -> None:
    with refusing_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(2, device=choose_device()).sum().item()


def test_the_same_steps_have_the_same_bits(job: Callable[..., Config]) -> None:
    first, again = plain_weights(job()), plain_weights(job())
    assert torch.equal(first, again), float((first - again).abs().max())


@pytest.mark.parametrize("name", SETTINGS)
def test_engines_take_the_steps_of_plain_pytorch(
    name: str, job: Callable[..., Config], group: None
) -> None:
    expected = plain_weights(job(FP32))
    config = job(FP32, *SETTINGS[name])
    found = weights_after(config, make_state(config, choose_device(), None))
    difference = float((found - expected).abs().max())
    print(f"{name}, largest difference: {difference:.1e}")
    allowed = IN_PARTS_TOLERANCE if MICRO_BATCHES in SETTINGS[name] else TOLERANCE
    assert difference < allowed
