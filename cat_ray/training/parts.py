"""Where a step's time goes, part by part, while a benchmark measures; else a part costs nothing."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Path = tuple[str, ...]


class PartTimes:
    """Seconds by part and the parts around it; what lies in no part has the empty path.

    Time goes to the innermost part alone. A GPU is waited for at the borders of parts, which slows
    a step down: measure its duration without this.
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[Path, float] = defaultdict(float)
        self._device = device
        self._open: list[str] = []
        self._since = self._now()

    def begin(self, name: str) -> None:
        """A part begins."""
        self._count()
        self._open.append(name)

    def end(self) -> None:
        """The innermost part ends."""
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = self._now()
        self.seconds[tuple(self._open)] += now - self._since
        self._since = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


_times: PartTimes | None = None


@contextmanager
def part(name: str) -> Iterator[None]:
    """A named part of a step, as a block or, put before a function, as all of its calls."""
    times = _times
    if times is None:
        yield
        return
    times.begin(name)
    try:
        yield
    finally:
        times.end()


@contextmanager
def measured(device: torch.device) -> Iterator[PartTimes]:
    """Measures the parts of what this process does inside the block."""
    global _times
    _times = PartTimes(device)
    try:
        yield _times
    finally:
        _times = None
