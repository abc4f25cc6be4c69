"""What a run's worker-seconds were spent on, in time and money, as a table and as JSON."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from cat_ray.operations.goodput import ALL_BINS, AWAY_SECONDS, AnyBin, Row, account, groups_of

LABELS: dict[AnyBin, str] = {
    "train": "train",
    "data_wait": "data wait",
    "save_stall": "save stall",
    "start": "start and restore",
    "evaluation": "evaluation",
    "lost": "lost: done again",
    "idle": "idle",
}
# What the same training takes on machines that nobody takes away.
UNDISTURBED: tuple[AnyBin, ...] = ("train", "data_wait", "save_stall")
REST: tuple[AnyBin, ...] = tuple(name for name in ALL_BINS if name not in UNDISTURBED)
NO_PRICES = "no money: cost.spot_per_gpu_hour and cost.on_demand_per_gpu_hour are not set"


@dataclass(frozen=True)
class Summary:
    """A run's time.

    Attributes:
        seconds: worker-seconds of every bin.
        images: images of the run at the end.
        workers: how many workers each group had, in order of time.
    """

    seconds: dict[AnyBin, float]
    images: int
    workers: tuple[int, ...]

    @property
    def total(self) -> float:
        """All worker-seconds that were paid for."""
        return sum(self.seconds.values())

    def of(self, *bins: AnyBin) -> float:
        """The worker-seconds of some bins together."""
        return sum(self.seconds[name] for name in bins)

    def share(self, *bins: AnyBin) -> float:
        """Their share of all; 0 before any time was spent."""
        return self.of(*bins) / self.total if self.total else 0.0

    @property
    def goodput(self) -> float:
        """The share of the time that was training, and kept."""
        return self.share("train")


@dataclass(frozen=True)
class Bill:
    """A run's time at one price, in dollars.

    Attributes:
        per_hour: of one worker.
        bins: of every bin.
        total: of all bins.
        undisturbed: of `UNDISTURBED` alone.
        per_million_images: None before the first image.
    """

    per_hour: float
    bins: dict[AnyBin, float]
    total: float
    undisturbed: float
    per_million_images: float | None


@dataclass(frozen=True)
class Saving:
    """What the spot price saved against the on-demand one, in dollars.

    Attributes:
        on_demand: what the run would have cost on demand without any loss.
        spot: what it cost.
        possible: the saving if spot had been without any loss as well.
        taken: what `REST` took from that.
        saved: what is left of it; negative if spot was dearer.
    """

    on_demand: float
    spot: float
    possible: float
    taken: float
    saved: float


def summarise(
    rows: Iterable[Row], away_seconds: float = AWAY_SECONDS, beside_seconds: float = 0.0
) -> Summary:
    """Adds up a run's ledger.

    Args:
        rows: of the ledger.
        away_seconds: longer gaps between groups were not paid for.
        beside_seconds: worker-seconds of measurements beside the training.
    """
    groups = groups_of(rows)
    seconds = account(groups, away_seconds)
    seconds["evaluation"] += beside_seconds
    return Summary(
        seconds=seconds,
        images=groups[-1].images if groups else 0,
        workers=tuple(group.workers for group in groups),
    )


def beside_seconds_of(rows: Iterable[Mapping[str, Any]]) -> float:
    """Worker-seconds of measurements beside the training, by a run's rows of figures."""
    measured = (row.get("worker_seconds") for row in rows if row["kind"] == "measured")
    # Rows that an earlier version wrote don't say.
    return sum(spent for spent in measured if isinstance(spent, int | float) and abs(spent) < 1e15)


def bill(summary: Summary, per_hour: float) -> Bill:
    """A run's time at a price per worker and hour."""
    per_second = per_hour / 3600
    total = summary.total * per_second
    return Bill(
        per_hour=per_hour,
        bins={name: seconds * per_second for name, seconds in summary.seconds.items()},
        total=total,
        undisturbed=summary.of(*UNDISTURBED) * per_second,
        per_million_images=total / summary.images * 1e6 if summary.images else None,
    )


def saving(spot: Bill, on_demand: Bill) -> Saving:
    """What the lower price saved, and what came of it."""
    return Saving(
        on_demand=on_demand.undisturbed,
        spot=spot.total,
        possible=on_demand.undisturbed - spot.undisturbed,
        taken=spot.total - spot.undisturbed,
        saved=on_demand.undisturbed - spot.total,
    )


def cost_table(
    summary: Summary, spot_per_hour: float | None, on_demand_per_hour: float | None
) -> RenderableType:
    """The account of a run for a person; prices are dollars per worker and hour."""
    bills = _bills(summary, spot_per_hour, on_demand_per_hour)
    digits = 2 if any(each.total >= 100 for each in bills.values()) else 4
    table = Table("bin", title=_title(summary), title_justify="left")
    for heading in ("worker-seconds", "share", *(name.replace("_", " ") for name in bills)):
        table.add_column(heading, justify="right")

    def add(label: str, bins: tuple[AnyBin, ...], money: Iterable[float]) -> None:
        time = (f"{summary.of(*bins):,.1f}", f"{summary.share(*bins):.1%}")
        table.add_row(label, *time, *(_dollars(value, digits) for value in money))

    for name in ALL_BINS:
        add(LABELS[name], (name,), (each.bins[name] for each in bills.values()))
    table.add_section()
    add("total", ALL_BINS, (each.total for each in bills.values()))
    add("without any loss", UNDISTURBED, (each.undisturbed for each in bills.values()))
    if bills and summary.images:
        rates = (each.per_million_images or 0.0 for each in bills.values())
        table.add_row("per million images", "", "", *(_dollars(rate, digits) for rate in rates))
    lines = [f"goodput {summary.goodput:.1%}"]
    if not bills:
        lines.append(NO_PRICES)
    if len(bills) == 2:
        lines.extend(_told(saving(**bills), digits))
    return Group(table, *lines)


def to_json(summary: Summary, spot_per_hour: float | None, on_demand_per_hour: float | None) -> str:
    """The same for a program: seconds, shares from 0 to 1, dollars."""
    bills = _bills(summary, spot_per_hour, on_demand_per_hour)
    content = {
        "images": summary.images,
        "workers": summary.workers,
        "worker_seconds": {**summary.seconds, "total": summary.total},
        "shares": {name: summary.share(name) for name in ALL_BINS},
        "goodput": summary.goodput,
        "bills": {name: asdict(each) for name, each in bills.items()},
        "saving": asdict(saving(**bills)) if len(bills) == 2 else None,
    }
    return json.dumps(content, indent=2)


def _bills(
    summary: Summary, spot_per_hour: float | None, on_demand_per_hour: float | None
) -> dict[str, Bill]:
    prices = {"spot": spot_per_hour, "on_demand": on_demand_per_hour}
    return {name: bill(summary, price) for name, price in prices.items() if price is not None}


def _title(summary: Summary) -> str:
    groups = len(summary.workers)
    if not groups:
        return "no worker group yet"
    fewest, most = min(summary.workers), max(summary.workers)
    workers = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"{summary.images:,} images, {groups} group{'s' * (groups > 1)} of {workers} workers"


def _told(saving: Saving, digits: int) -> tuple[str, str]:
    on_demand, spot, possible, taken, _ = (_dollars(value, digits) for value in astuple(saving))
    difference = _dollars(abs(saving.saved), digits)
    result = f"saved {difference}" if saving.saved >= 0 else f"cost {difference} more"
    return (
        f"on demand without any loss {on_demand}, spot {spot}: spot {result}",
        f"{', '.join(REST)} took {taken} of a possible saving of {possible}",
    )


def _dollars(value: float, digits: int) -> str:
    return f"{'-' * (value < 0)}${abs(value):,.{digits}f}"
