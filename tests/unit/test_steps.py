"""The step itself: it asks the device for nothing, and micro-batches add up to the batch."""

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cat_ray.config import Config, parse
from cat_ray.evaluation.alignment_metrics import alignment_figures
from cat_ray.model.build import build_discriminator, build_generator, compile_blocks
from cat_ray.objective.alignment import Teacher
from cat_ray.training.draws import draw_step
from cat_ray.training.lanes import micro_batches
from cat_ray.training.reals import Reals
from cat_ray.training.steps import (
    Adversaries,
    Figures,
    MicroBatch,
    add_up,
    discriminator_step,
    generator_step,
)

META, CPU = torch.device("meta"), torch.device("cpu")


class Adding:
    """An engine that only adds gradients up."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def descend(self, loss: Tensor, last: bool) -> None:
        del last
        loss.backward()

    def gradient_norm(self) -> Tensor:
        return torch.zeros((), device=next(self.module.parameters()).device)

    def gradients(self) -> dict[str, Tensor]:
        named = self.module.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}


class NoCopies(TorchDispatchMode):
    """Refuses what copies between the host and the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        leaves = [v for v in tree_leaves((args, kwargs, made)) if isinstance(v, Tensor)]
        devices = {value.device.type for value in leaves}
        assert len(devices) < 2, f"{func} copies between the host and the device"
        return made


class NoTensorsOfNumbers(TorchFunctionMode):
    """Refuses what makes a tensor of Python's numbers, and so copies it to the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), func
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(each, list) for each in index), "indexed by a list"
        return func(*args, **(kwargs or {}))


def adversaries(config: Config, device: torch.device) -> Adversaries:
    with device:
        torch.manual_seed(0)
        generator, discriminator = build_generator(config), build_discriminator(config)
    teacher = None
    if config.objective.alignment.weight:
        transformers = pytest.importorskip("transformers")
        shape = transformers.Dinov2Config(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28
        )
        with device:
            teacher = Teacher(transformers.Dinov2Model(shape))
    return Adversaries(config, Adding(generator), Adding(discriminator), teacher)  # pyright: ignore[reportArgumentType]


def micro_batch(
    config: Config, lanes: range, device: torch.device, last: bool = True
) -> MicroBatch:
    size, side = config.optimisation.lane_size, config.model.resolution
    images = torch.randn(12, config.model.channels, side, side, generator=torch.Generator())
    rows = slice(lanes.start * size, lanes.stop * size)
    own, labels = images[rows].to(device), (torch.arange(12) % 10)[rows].to(device)
    return MicroBatch(Reals(own, own), labels, draw_step(config, lanes, 3, device), last)


def both_steps(both: Adversaries, parts: list[MicroBatch]) -> Figures:
    """What the training loop does with one batch, without the optimisers."""
    fakes = [both.generator(part.draws.latents, part.labels) for part in parts]
    pairs = list(zip(parts, fakes, strict=True))
    figures = add_up(discriminator_step(both, part, made.detach()) for part, made in pairs)
    figures |= add_up(generator_step(both, part, made) for part, made in pairs)
    figures |= add_up(
        {name: values.sum() for name, values in alignment_figures(made.detach()).items()}
        for made in fakes
    )
    return figures


@pytest.fixture
def job(tiny_job: str) -> Callable[..., Config]:
    def changed(*changes: str) -> Config:
        sizes = ("optimisation.batch_size=12", "optimisation.lanes=6", "run.total_images=120")
        return parse(tiny_job, "job", (*sizes, *changes))

    return changed


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("objective.alignment={weight: 1.0, teacher_width: 24}",),
        ("objective.penalty.weight=0", "objective.consistency.weight=0"),
        ("optimisation.activation_checkpointing=true",),
        ("optimisation.micro_batch_lanes=4",),
    ],
)
def test_the_step_waits_for_nothing_on_the_device(
    job: Callable[..., Config], changes: tuple[str, ...]
) -> None:
    config = job(*changes)
    both = adversaries(config, META)
    lanes = micro_batches(6, 1, 0, config.optimisation.micro_batch_lanes)
    parts = [micro_batch(config, each, META, each.stop == 6) for each in lanes]
    # On the meta device nothing has a value: asking for one, as .item(), .cpu(), an if or an index
    # by truth values do, raises an error.
    with NoCopies(), NoTensorsOfNumbers():
        figures = both_steps(both, parts)
    assert all(value.device == META for value in figures.values())


@pytest.mark.parametrize(
    "waiting",
    [
        lambda images: images.mean().item(),
        lambda images: images.cpu(),
        lambda images: images[images > 0],
        lambda images: images[:, [0, 1]],
        lambda images: bool(images.any()),
        lambda images: images * torch.tensor([1.0, 2.0], device=META)[0],
    ],
)
def test_a_step_that_would_wait_is_told_from_one_that_does_not(waiting: Callable) -> None:
    errors = (RuntimeError, NotImplementedError, AssertionError)
    with pytest.raises(errors), NoCopies(), NoTensorsOfNumbers():
        waiting(torch.empty(4, 2, device=META))


@pytest.mark.parametrize("most", [2, 4])
def test_micro_batches_add_up_to_the_gradients_and_figures_of_the_batch(
    job: Callable[..., Config], most: int
) -> None:
    found = []
    for size in (None, most):
        config = job("objective.penalty.share=0.5")
        both = adversaries(config, CPU)
        parts = [
            micro_batch(config, each, CPU, each.stop == 6) for each in micro_batches(6, 1, 0, size)
        ]
        figures = both_steps(both, parts)
        found.append((figures, both.generator.gradients(), both.discriminator.gradients()))
    for whole, added in zip(*found, strict=True):
        assert whole.keys() == added.keys()
        for name, value in whole.items():
            torch.testing.assert_close(added[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_without_penalty_nothing_is_judged_again(
    job: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    for weight in (1.0, 0.0):
        config = job(f"objective.penalty.weight={weight}")
        both = adversaries(config, CPU)
        judge = both.discriminator.module
        hook = judge.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[1])))
        both_steps(both, [micro_batch(config, range(6), CPU)])
        hook.remove()
    penalised = 6 * job().penalised_per_lane()
    # In the discriminator's step all at once, in the generator's reals and fakes.
    assert rows == [24 + 2 * penalised, 12, 12, 24, 12, 12]


def test_compiled_blocks_have_the_same_gradients_and_a_resize_compiles_nothing(
    job: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All but the C++ that would be made of the graphs, which takes a minute.
    eagerly = partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", eagerly)
    config = job()
    eager, compiled = adversaries(config, CPU), adversaries(config, CPU)
    for network in (compiled.generator.module, compiled.discriminator.module):
        compile_blocks(network)  # pyright: ignore[reportArgumentType]

    def parts_of(world_size: int) -> list[MicroBatch]:
        own = [micro_batches(6, world_size, rank, 2) for rank in range(world_size)]
        return [micro_batch(config, lanes, CPU) for parts in own for lanes in parts]

    counters.clear()
    for both in (eager, compiled):
        both_steps(both, parts_of(1))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for name in ("generator", "discriminator"):
        expected, found = (getattr(each, name).gradients() for each in (eager, compiled))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    both_steps(compiled, parts_of(3))
    assert counters["stats"]["unique_graphs"] == graphs
