"""Adds up figures between log lines, over steps and workers, and knows where the time went."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, distributed

from cat_ray.data.read import Batch
from cat_ray.operations.goodput import Ledger


class Recorder:
    """Sums of figures since the last line, on the device: nothing waits for them before then."""

    def __init__(self, device: torch.device):
        self._device = device
        self._restart()

    def timed(self, batches: Iterator[Batch], ledger: Ledger) -> Iterator[Batch]:
        """The same batches; the time spent waiting for each is counted, in the ledger as well."""
        while True:
            asked = time.perf_counter()
            with ledger.spending("data_wait"):
                batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            self._broken.extend(str(line) for line in batch.broken if line)
            yield batch

    def add(self, figures: dict[str, Tensor]) -> None:
        """Takes one step's figures: this worker's parts of the batch's means."""
        for name, value in figures.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Leaves out time that was spent on something else than training."""
        self._started += seconds

    def collect(self, batch_size: int) -> tuple[dict[str, float], list[str]]:
        """Means over the steps since the last line and all workers, and the broken samples met.

        Every worker must call this. Starts the next interval.
        """
        elapsed = time.perf_counter() - self._started
        names = sorted(self._sums)
        wait_share = torch.tensor(self._waited / elapsed / distributed.get_world_size())
        sums = [self._sums[name] / self._steps for name in names]
        packed = torch.stack([*sums, wait_share.to(self._device)])
        distributed.all_reduce(packed)
        values = dict(zip([*names, "data_wait_share"], packed.tolist(), strict=True))
        values["images_per_second"] = self._steps * batch_size / elapsed
        broken: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(broken, self._broken)
        self._restart()
        return values, [line for lines in broken for line in lines]

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._waited = 0.0
        self._broken: list[str] = []
        self._started = time.perf_counter()
