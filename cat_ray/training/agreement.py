"""What all workers find out together after each step, by one small sum on the CPU."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

from cat_ray.training.parts import part

T = TypeVar("T")


@dataclass(frozen=True)
class Coming:
    """A step's figures on their way to the CPU, where they are once `arrived` has happened."""

    names: tuple[str, ...]
    values: Tensor
    arrived: torch.cuda.Event | None


class Agreement:
    """Adds up figures and wishes over the workers; every worker must call each method.

    Figures come one step late: their way from a GPU to the CPU is begun in their own step and
    asked for in the next, so that no step waits for the device; only `settle` does. `group` is a
    process group on the CPU, None for the default one.
    """

    def __init__(self) -> None:
        on_cpu = distributed.get_backend() == "gloo"
        self.group = None if on_cpu else distributed.new_group(backend="gloo")
        self._coming: list[Coming] = []
        self._seconds: list[float] = []

    @part("agreement")
    def send(self, figures: dict[str, Tensor]) -> None:
        """Begins to bring a step's figures, this worker's parts of the means, to the CPU."""
        values = torch.stack([value.detach().float() for value in figures.values()])
        on_cpu = torch.empty(len(values), pin_memory=values.is_cuda)
        on_cpu.copy_(values, non_blocking=True)
        arrived = None
        if values.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._coming.append(Coming(tuple(figures), on_cpu, arrived))

    @part("agreement")
    def after_step(self, wishes: Sequence[bool]) -> tuple[list[dict[str, float]], list[bool]]:
        """The figures of the steps before this one, and which wishes any worker has now.

        Args:
            wishes: what this worker wants all of them to do.
        """
        late, self._coming = self._coming[:-1], self._coming[-1:]
        return self._sum(late, wishes)

    def take_seconds(self) -> list[float]:
        """Seconds of each sum since this was last asked, with waiting for the other workers."""
        seconds, self._seconds = self._seconds, []
        return seconds

    def settle(self) -> list[dict[str, float]]:
        """The figures that are still to come, this step's as well, waiting for them."""
        late, self._coming = self._coming, []
        return self._sum(late, [])[0]

    def any(self, wish: bool) -> bool:
        """Whether any worker says so."""
        return self._sum([], [wish])[1][0]

    def gather(self, value: T) -> list[T]:
        """Every worker's value, by rank."""
        values: list[T | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value, group=self.group)
        return values  # pyright: ignore[reportReturnType]

    def barrier(self) -> None:
        """Waits for all workers."""
        distributed.barrier(group=self.group)

    def _sum(
        self, late: Sequence[Coming], wishes: Sequence[bool]
    ) -> tuple[list[dict[str, float]], list[bool]]:
        for each in late:
            if each.arrived is not None:
                each.arrived.synchronize()
        began = time.perf_counter()
        packed = torch.cat([*(each.values for each in late), torch.tensor(wishes).float()])
        if not len(packed):
            return [], []
        distributed.all_reduce(packed, group=self.group)
        values = iter(packed.tolist())
        self._seconds.append(time.perf_counter() - began)
        figures = [{name: next(values) for name in each.names} for each in late]
        return figures, [value > 0 for value in values]
