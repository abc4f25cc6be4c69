"""Moving averages of the generator's weights, in fp32, held as its engine holds the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cat_ray.training.engines import Engine, local_values


class Averages:
    """An average of each parameter for each decay; under ZeRO 3 only of this worker's shards."""

    def __init__(self, engine: Engine, decays: tuple[float, ...]):
        self._engine = engine
        self._parameters = list(engine.module.parameters())
        self._averages = {
            decay: [local_values(p).detach().clone() for p in self._parameters] for decay in decays
        }

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

    def weights(self, decay: float) -> dict[str, Tensor]:
        """The full averaged parameters by name, on the CPU. Every worker must call this."""
        with self.applied(decay):
            return self._engine.weights()

    @torch.no_grad()
    def load(self, decay: float, weights: dict[str, Tensor]) -> None:
        """Takes over full averaged parameters by name."""
        names = [name for name, _ in self._engine.module.named_parameters()]
        for name, parameter, average in zip(
            names, self._parameters, self._averages[decay], strict=True
        ):
            average.copy_(self._engine.local_part(weights[name], parameter))

    @torch.no_grad()
    def _swap(self, decay: float) -> None:
        self._engine.release()
        for parameter, average in zip(self._parameters, self._averages[decay], strict=True):
            present = local_values(parameter)
            kept = present.clone()
            present.copy_(average)
            average.copy_(kept)
