"""What all workers find out together after each step, by one small sum on the CPU."""

import time
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed

from cat_ray.training.parts import part

T = TypeVar("T")


class Agreement:
    """Adds up figures and wishes over the workers; every worker must call each method.

    Figures come one step late: their way from a GPU to the CPU is begun in their own step and
    asked for in the next, so that no step waits for the device. `group` is a process group on the
    CPU, None for the default one.
    """

    def __init__(self) -> None:
        on_cpu = distributed.get_backend() == "gloo"
        self.group = None if on_cpu else distributed.new_group(backend="gloo")
        self._names: list[str] = []
        self._coming: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._seconds: list[float] = []

    @part("agreement")
    def after_step(
        self, figures: dict[str, Tensor], wishes: Sequence[bool]
    ) -> tuple[dict[str, float] | None, list[bool]]:
        """The figures of the step before, if there was one, and which wishes any worker has now.

        Args:
            figures: this worker's parts of the batch's means in the step that has ended.
            wishes: what this worker wants all of them to do.
        """
        last, held = self._sum([float(wish) for wish in wishes])
        self._names = list(figures)
        values = torch.stack([figures[name].detach().float() for name in self._names])
        self._coming = torch.empty(len(values), pin_memory=values.is_cuda)
        self._coming.copy_(values, non_blocking=True)
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return last, [value > 0 for value in held]

    def take_seconds(self) -> list[float]:
        """Seconds of each sum since this was last asked, with waiting for the other workers."""
        seconds, self._seconds = self._seconds, []
        return seconds

    def settle(self) -> dict[str, float] | None:
        """The figures that are still to come, waiting for them; None if there are none."""
        last, _ = self._sum([])
        self._coming = None
        return last

    def gather(self, value: T) -> list[T]:
        """Every worker's value, by rank."""
        values: list[T | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value, group=self.group)
        return values  # pyright: ignore[reportReturnType]

    def barrier(self) -> None:
        """Waits for all workers."""
        distributed.barrier(group=self.group)

    def _sum(self, wishes: list[float]) -> tuple[dict[str, float] | None, list[float]]:
        if self._arrived is not None:
            self._arrived.synchronize()
        began = time.perf_counter()
        late = self._coming if self._coming is not None else torch.empty(0)
        packed = torch.cat([late, torch.tensor(wishes)])
        if not len(packed):
            return None, []
        distributed.all_reduce(packed, group=self.group)
        values = packed.tolist()
        self._seconds.append(time.perf_counter() - began)
        figures = dict(zip(self._names, values[: len(late)], strict=True)) if len(late) else None
        return figures, values[len(late) :]
