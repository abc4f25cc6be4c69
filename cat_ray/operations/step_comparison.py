"""What `cat-ray bench step` found: medians, ratios, and one table of all ways to take a step."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from cat_ray.operations.gpus import known_gpus
from cat_ray.operations.step_times import StepTimes

PLAIN, REFERENCE = "plain PyTorch", "reference order"


def ours(workers: int) -> str:
    """The name of our way with so many workers."""
    return f"cat-ray, {workers} worker{'s' if workers > 1 else ''}"


@dataclass(frozen=True)
class Steps:
    """The repetitions of each way to take a step.

    Attributes:
        ways: `ours(n)`, `PLAIN` and `REFERENCE`; with several workers those of the first.
        workers: the n.
        batch_size: images of a step, however many workers share them.
        operations: that a step takes, a multiplication and an addition being two.
    """

    ways: Mapping[str, Sequence[StepTimes]]
    workers: tuple[int, ...]
    batch_size: int
    operations: float

    def seconds(self, way: str) -> float:
        """A step's median."""
        return statistics.median(times.seconds for times in self.ways[way])

    def parts(self, way: str) -> dict[str, float]:
        """The median of each part, in seconds."""
        every = self.ways[way]
        names = dict.fromkeys(name for times in every for name in times.parts)
        return {name: statistics.median(t.parts.get(name, 0.0) for t in every) for name in names}

    def memory_bytes(self, way: str) -> float:
        """The median of the most that a process held."""
        return statistics.median(times.memory_bytes for times in self.ways[way])

    def images_per_second(self, way: str) -> float:
        """Of the whole batch."""
        return self.batch_size / self.seconds(way)

    @property
    def peak(self) -> float | None:
        """Operations a second of one device: measured of a CPU's thread, told of a GPU in
        `gpus.yaml`, None of one that isn't there.
        """
        plain = self.ways[PLAIN]
        measured = max(times.peak for times in plain)
        words = plain[0].device.replace("-", " ").split()
        told = [gpu.peak_teraflops * 1e12 for name, gpu in known_gpus().items() if name in words]
        return measured or (told[0] if told else None)

    def share_of_peak(self, way: str) -> float | None:
        """Our step's operations in this way's time, of what its devices can do.

        What the reference order computes twice counts once.
        """
        devices = {ours(count): count for count in self.workers}.get(way, 1)
        peak = self.peak
        return self.operations / self.seconds(way) / (devices * peak) if peak else None

    def ratios(self) -> dict[str, float]:
        """What the figures are for, by what they say."""
        first = ours(self.workers[0])
        found = {
            f"step of {first} over {PLAIN}": self.seconds(first) / self.seconds(PLAIN),
            f"step of {REFERENCE} over {PLAIN}": self.seconds(REFERENCE) / self.seconds(PLAIN),
        }
        for count in self.workers[1:]:
            rate = self.images_per_second(ours(count)) / self.images_per_second(first)
            found[f"images/s of {ours(count)} over {first}"] = rate
        return found


def step_table(steps: Steps) -> Table:
    """The figures, for a person."""
    ways = list(steps.ways)
    parts = {way: steps.parts(way) for way in ways}
    table = Table(title=f"a step of {steps.batch_size} images, medians", caption=_caption(steps))
    table.add_column(no_wrap=True)
    for way in ways:
        table.add_column(way, justify="right")
    for name in dict.fromkeys(name for way in ways for name in parts[way]):
        values = [parts[way].get(name) for way in ways]
        table.add_row(name, *("" if v is None else f"{1000 * v:,.1f} ms" for v in values))
    table.add_section()
    rows: dict[str, list[str]] = {
        "sum of parts": [f"{1000 * sum(parts[way].values()):,.0f} ms" for way in ways],
        "step, without parts' timers": [f"{1000 * steps.seconds(way):,.0f} ms" for way in ways],
        "least and most": [_range(steps.ways[way]) for way in ways],
        "images/s": [f"{steps.images_per_second(way):,.2f}" for way in ways],
        "peak memory": [f"{steps.memory_bytes(way) / 1e6:,.0f} MB" for way in ways],
        "share of peak": [_share(steps.share_of_peak(way)) for way in ways],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def to_json(steps: Steps) -> str:
    """The same for scripts."""
    medians: dict[str, Any] = {
        way: {
            "seconds": steps.seconds(way),
            "parts": steps.parts(way),
            "images_per_second": steps.images_per_second(way),
            "memory_bytes": steps.memory_bytes(way),
            "share_of_peak": steps.share_of_peak(way),
        }
        for way in steps.ways
    }
    return json.dumps(
        {**asdict(steps), "peak": steps.peak, "medians": medians, "ratios": steps.ratios()},
        indent=1,
    )


def _caption(steps: Steps) -> str:
    lines = [f"{what}: {value:.2f}" for what, value in steps.ratios().items()]
    if steps.peak:
        lines.append(f"peak of one device: {steps.peak / 1e12:,.3f} TFLOP/s")
    return "\n".join(lines)


def _range(every: Sequence[StepTimes]) -> str:
    seconds = [times.seconds for times in every]
    return f"{1000 * min(seconds):,.0f}-{1000 * max(seconds):,.0f}"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"
