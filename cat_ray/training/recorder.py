"""Adds up figures between log lines, over steps and workers, and knows where the time went."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from cat_ray.data.read import Batch
from cat_ray.evaluation.alignment_metrics import alignment_figures
from cat_ray.operations.goodput import Ledger
from cat_ray.training.parts import part
from cat_ray.training.steps import Figures, add_up


class Recorder:
    """Sums of figures since the last line, on the device: nothing waits for them before then."""

    def __init__(self, device: torch.device, batch_size: int):
        self._device = device
        self._batch_size = batch_size
        self._restart(time.perf_counter())

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

    @part("figures")
    def add(self, figures: Figures, fakes: Sequence[Tensor]) -> None:
        """Takes one step's figures, this worker's parts of the batch's means, and those of how well
        the stage outputs agree: `[K, n, c, R, R]` of each micro-batch.
        """
        with self.reporting():
            stages = add_up(
                {name: values.sum() / self._batch_size for name, values in measured.items()}
                for measured in (alignment_figures(outputs) for outputs in fakes)
            )
            self._sums = add_up([self._sums, figures | stages])
            self._steps += 1

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Counts the time inside as spent on figures, not on the step."""
        began = time.perf_counter()
        yield
        self._reported += time.perf_counter() - began

    def pause(self, seconds: float) -> None:
        """Leaves out time that was spent on something else than training."""
        self._started += seconds

    def collect(self, agreed_seconds: list[float]) -> tuple[dict[str, float], list[str]]:
        """Means over the steps since the last line and all workers, and the broken samples met.

        Every worker must call this. Starts the next interval, which its own time belongs to.

        Args:
            agreed_seconds: what each agreement with the others took since the last line. Who comes
                last waits for nobody: the least of the workers is what it costs.
        """
        if self._device.type == "cuda":
            # What the device has still to do is training, not reporting.
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        elapsed = now - self._started
        names = sorted(self._sums)
        wait_share = torch.tensor(self._waited / elapsed / distributed.get_world_size())
        sums = [self._sums[name] / self._steps for name in names]
        packed = torch.stack([*sums, wait_share.to(self._device)])
        distributed.all_reduce(packed)
        values = dict(zip([*names, "data_wait_share"], packed.tolist(), strict=True))
        overhead = torch.tensor([self._reported, *(-s for s in agreed_seconds)])
        overhead = overhead.to(self._device)
        distributed.all_reduce(overhead, distributed.ReduceOp.MAX)
        reported, *least_agreed = overhead.tolist()
        values["report_share"] = reported / elapsed
        values["agreement_share"] = -sum(least_agreed) / elapsed
        values["images_per_second"] = self._steps * self._batch_size / elapsed
        broken: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(broken, self._broken)
        self._restart(now)
        self._reported = time.perf_counter() - now
        return values, [line for lines in broken for line in lines]

    def _restart(self, now: float) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._waited = 0.0
        self._reported = 0.0
        self._broken: list[str] = []
        self._started = now
