"""What forward passes keep for the backward pass, counted on the real networks without memory.

The networks are run on PyTorch's fake tensors, which have a shape, a type and a place but no
content, and what autograd saves is added up. It grows by the same amount with each block, so two
shallow networks tell that of any depth. Autocast is the CPU's: its list of operations differs from
CUDA's in little (rms_norm, which CUDA takes in fp32), so figures for bf16 are estimates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from cat_ray.config import Config, DiscriminatorNetwork, ExplicitSize, GeneratorNetwork
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.model.discriminator import Discriminator
from cat_ray.model.generator import Generator


@dataclass(frozen=True)
class Rows:
    """How many images a worker runs through a network in a step.

    Attributes:
        generated: through the generator.
        judged: through the discriminator in its own step, penalised ones included.
        judged_again: fakes through the frozen discriminator in the generator's step.
        aligned: reals that are projected for the teacher.
    """

    generated: int
    judged: int
    judged_again: int
    aligned: int


@dataclass(frozen=True)
class Counted:
    """A network at its full depth.

    Attributes:
        tensors: parameters of the network.
        parameters: their elements.
        saved: bytes that a forward pass keeps, without activation checkpointing.
        block: of that, one block's.
        checkpointed: bytes kept with activation checkpointing, and what one block needs while it is
            computed again.
    """

    tensors: int
    parameters: int
    saved: int
    block: int
    checkpointed: int


@dataclass(frozen=True)
class Activations:
    """The graphs of a step, in bytes: `Counted.saved` or `.checkpointed` of each."""

    generator: int
    discriminator_step: int
    generator_step: int

    def peak(self, reuse_generator_forward: bool) -> int:
        """The most that is held at once: the generator's graph lives through both steps if reused.

        Without reuse it is made anew after the discriminator's step.
        """
        if reuse_generator_forward:
            return self.generator + max(self.discriminator_step, self.generator_step)
        return max(self.discriminator_step, self.generator + self.generator_step)


@dataclass(frozen=True)
class Networks:
    """Both networks of a job as counted for a worker's rows."""

    generator: Counted
    discriminator: Counted
    frozen_discriminator: Counted

    def activations(self, checkpointing: bool) -> Activations:
        """The graphs of a step with activation checkpointing or without."""
        counted = (self.generator, self.discriminator, self.frozen_discriminator)
        return Activations(*(c.checkpointed if checkpointing else c.saved for c in counted))


def rows_of(config: Config, workers: int) -> Rows:
    """The rows of the largest micro-batch of the worker with the most lanes."""
    lanes = -(-config.optimisation.lanes // workers)
    lanes = min(lanes, config.optimisation.micro_batch_lanes or lanes)
    images, penalised = lanes * config.optimisation.lane_size, lanes * config.penalised_per_lane()
    return Rows(
        generated=images,
        judged=2 * images + 2 * penalised,
        judged_again=images,
        aligned=images if config.objective.alignment.weight else 0,
    )


def count_networks(config: Config, rows: Rows, dtype: torch.dtype | None) -> Networks:
    """Counts a job's networks.

    Args:
        config: the job.
        rows: of a worker.
        dtype: of autocast; None is fp32 throughout.
    """
    model = config.model

    def generate(network: nn.Module) -> None:
        latents = torch.zeros(rows.generated, model.generator.latent_width)
        network(latents, torch.zeros(rows.generated, dtype=torch.long))

    def judge(network: nn.Module, count: int, aligned: int = 0, fakes: bool = False) -> None:
        pyramid = [
            torch.zeros(count, model.channels, side, side, requires_grad=fakes)
            for side in model.scales()
        ]
        network(pyramid, torch.zeros(count, dtype=torch.long), aligned)

    def judge_frozen(network: nn.Module) -> None:
        network.requires_grad_(False)
        judge(network, rows.judged_again, fakes=True)
        network.requires_grad_(True)

    def generator(depth: int) -> Generator:
        return build_generator(_at_depth(config, "generator", depth), dtype)

    def discriminator(depth: int) -> Discriminator:
        return build_discriminator(_at_depth(config, "discriminator", depth), dtype)

    def judge_once(network: nn.Module) -> None:
        judge(network, rows.judged, rows.aligned)

    (generated,) = _count(generator, model.generator.dimensions().depth, model.stages, (generate,))
    judged, judged_again = _count(
        discriminator, model.discriminator.dimensions().depth, 1, (judge_once, judge_frozen)
    )
    return Networks(generated, judged, judged_again)


class _Saved:
    """What autograd saves, each storage once."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Kept, so that no later storage gets the same address.
        self._storages[storage._cdata] = storage
        return tensor

    def bytes_beside(self, network: nn.Module) -> int:
        own = {
            tensor.untyped_storage()._cdata
            for tensor in (*network.parameters(), *network.buffers())
        }
        return sum(s.nbytes() for place, s in self._storages.items() if place not in own)


Run = Callable[[nn.Module], None]


def _count(
    build: Callable[[int], Generator | Discriminator], depth: int, step: int, runs: Sequence[Run]
) -> list[Counted]:
    """Counts at depths of one and two `step`, and goes on from there in a straight line."""
    with FakeTensorMode():
        shallow, deeper = build(step), build(2 * step)

        def whole(measure: Callable[[nn.Module], int]) -> tuple[int, int]:
            """At full depth, and what one block adds."""
            first, second = measure(shallow), measure(deeper)
            return first + (depth // step - 1) * (second - first), (second - first) // step

        tensors, _ = whole(lambda network: len(list(network.parameters())))
        parameters, _ = whole(lambda network: sum(p.numel() for p in network.parameters()))
        counted = []
        for run in runs:
            saved, block = whole(partial(_saved, run, False))
            kept, _ = whole(partial(_saved, run, True))
            counted.append(Counted(tensors, parameters, saved, block, kept + block))
    return counted


def _saved(run: Run, checkpointing: bool, network: Generator | Discriminator) -> int:
    """Bytes that a forward pass saves, with activation checkpointing or without."""
    saved = _Saved()
    network.shape = replace(network.shape, activation_checkpointing=checkpointing)
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        run(network)
    return saved.bytes_beside(network)


def _at_depth(config: Config, network: str, depth: int) -> Config:
    """The same job with a network of another depth."""
    section: GeneratorNetwork | DiscriminatorNetwork = getattr(config.model, network)
    size = section.dimensions()
    shallow = ExplicitSize(depth=depth, width=size.width, heads=size.heads)
    resized = section.model_copy(update={"size": shallow})
    return config.model_copy(update={"model": config.model.model_copy(update={network: resized})})
