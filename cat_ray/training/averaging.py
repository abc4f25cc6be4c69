"""Moving averages of the generator's weights, in fp32, held as its engine holds the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from cat_ray.training.engines import PARTITIONED, Engine, Fragment, local_values
from cat_ray.training.parts import part


class Averages:
    """An average of each parameter for each decay; under ZeRO 3 only of this worker's shards."""

    def __init__(self, engine: Engine, decays: tuple[float, ...]):
        self._engine = engine
        named = list(engine.module.named_parameters())
        self._parameters = [parameter for _, parameter in named]
        self._places = {name: place for place, (name, _) in enumerate(named)}
        self._averages = {
            decay: [local_values(p).detach().clone() for p in self._parameters] for decay in decays
        }

    @property
    def decays(self) -> tuple[float, ...]:
        """The decays that there is an average for."""
        return tuple(self._averages)

    @part("averages")
    @torch.no_grad()
    def update(self) -> None:
        """Moves every average towards the present weights: a <- decay a + (1 - decay) w."""
        present = [local_values(parameter) for parameter in self._parameters]
        for decay, average in self._averages.items():
            torch._foreach_lerp_(average, present, 1.0 - decay)

    @contextmanager
    def applied(self, decay: float) -> Iterator[nn.Module]:
        """The generator with averaged weights, for as long as the block lasts."""
        self._swap(decay)
        try:
            yield self._engine.module
        finally:
            self._swap(decay)

    def fragment(self, decay: float, fragment: Fragment) -> Tensor:
        """The average of a fragment's elements, `[length]`, a view."""
        average = self._averages[decay][self._places[fragment.name]].view(-1)
        # Under ZeRO 3 the shard is all that there is.
        start = 0 if self._engine.zero_stage == PARTITIONED else fragment.offset
        return average[start : start + fragment.length]

    @torch.no_grad()
    def load(self, decay: float, run: Callable[[str, int, int], Tensor]) -> None:
        """Takes over averages from a function of parameter name, offset and length."""
        for name, place in self._places.items():
            average = self._averages[decay][place]
            sharded = self._engine.zero_stage == PARTITIONED
            offset = distributed.get_rank() * average.numel() if sharded else 0
            average.view(-1).copy_(run(name, offset, average.numel()))

    @torch.no_grad()
    def _swap(self, decay: float) -> None:
        self._engine.release()
        for parameter, average in zip(self._parameters, self._averages[decay], strict=True):
            present = local_values(parameter)
            kept = present.clone()
            present.copy_(average)
            average.copy_(kept)
