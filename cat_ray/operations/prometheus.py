"""A run's figures for Prometheus, through Ray's metrics; names and units are `METRICS`.

The driver takes them from what the run writes down, so that the training never waits for them.
Ray's agent on the driver's node serves them, under `ray_<name>`; it needs `ray[default]`, and
without that Ray drops them silently.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ray.util.metrics import Counter, Gauge

from cat_ray.errors import ExpectedError
from cat_ray.operations.cost import beside_seconds_of, bill, summarise
from cat_ray.operations.goodput import Row as LedgerRow
from cat_ray.operations.goodput import groups_of, read_ledger
from cat_ray.operations.journal import Row
from cat_ray.storage import Location

# Ray's agent forgets a gauge that isn't set again within two of its intervals of ten seconds.
PUSH_SECONDS = 5.0
# The ledger of many workers on an object store takes a while to read: this share of the time.
LEDGER_SHARE = 0.05
FID = "fid"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """A metric as it is exported.

    Attributes:
        name: Prometheus has `ray_` before it.
        kind: counters never fall, and are of the whole run, over all calls of the command.
        unit: of its values.
        description: what it tells.
        tags: that each of its values has.
    """

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    description: str
    tags: tuple[str, ...] = ("run",)


METRICS = (
    Metric("cat_ray_images_total", "counter", "images", "Trained, those done again counted again."),
    Metric("cat_ray_images_per_second", "gauge", "images/s", "Over the last interval that ended."),
    Metric("cat_ray_step_seconds", "gauge", "s", "Of a step, over the last interval that ended."),
    Metric("cat_ray_data_wait_seconds", "gauge", "s", "Of each step spent waiting for data."),
    Metric("cat_ray_save_stall_seconds", "gauge", "s", "That the last save held training up."),
    Metric("cat_ray_world_size", "gauge", "workers", "In the newest worker group."),
    Metric("cat_ray_goodput_ratio", "gauge", "ratio", "Worker-time that trained, and was kept."),
    Metric(
        "cat_ray_cost_dollars_total",
        "counter",
        "$",
        "Worker-time at cost.spot_per_gpu_hour, or else at cost.on_demand_per_gpu_hour.",
    ),
    Metric(
        "cat_ray_fid",
        "gauge",
        "",
        "The newest checkpoint's; other protocols can't be compared.",
        ("run", "protocol"),
    ),
    Metric("cat_ray_lost_images_total", "counter", "images", "Trained, and then done again."),
    Metric("cat_ray_restarts_total", "counter", "groups", "Worker groups after the first."),
)


@dataclass(frozen=True)
class Point:
    """What a metric is now; `tags` beside the run."""

    name: str
    value: float
    tags: Mapping[str, str] = field(default_factory=dict)


def points_of_rows(rows: Sequence[Row], session: str, batch_size: int) -> Iterator[Point]:
    """What a run's rows tell: speed by its newest line of this session, its last save, its FIDs."""
    newest = {row["kind"]: row for row in rows if row["session"] == session}
    if (train := newest.get("train")) is not None:
        step = batch_size / train["images_per_second"]
        yield Point("cat_ray_images_per_second", train["images_per_second"])
        yield Point("cat_ray_step_seconds", step)
        yield Point("cat_ray_data_wait_seconds", train["data_wait_share"] * step)
    if (saved := newest.get("checkpoint")) is not None:
        yield Point("cat_ray_save_stall_seconds", saved["stall_seconds"])
    measured = {row["metric"]: row for row in rows if row["kind"] == "measured"}
    for metric, row in measured.items():
        # A distance on other features than Inception's is no FID.
        if metric.startswith(FID):
            yield Point("cat_ray_fid", row[metric], {"protocol": metric})


def points_of_ledger(
    rows: Iterable[LedgerRow], price_per_hour: float | None, beside_seconds: float = 0.0
) -> Iterator[Point]:
    """What a run's ledger tells of all its worker groups, and of measurements beside them."""
    rows = list(rows)
    groups = groups_of(rows)
    if not groups:
        return
    summary = summarise(rows, beside_seconds=beside_seconds)
    yield Point("cat_ray_images_total", sum(group.images - group.start for group in groups))
    yield Point("cat_ray_world_size", groups[-1].workers)
    yield Point("cat_ray_goodput_ratio", summary.goodput)
    yield Point("cat_ray_lost_images_total", sum(group.lost_images for group in groups))
    yield Point("cat_ray_restarts_total", len(groups) - 1)
    if price_per_hour is not None:
        yield Point("cat_ray_cost_dollars_total", bill(summary, price_per_hour).total)


class Exported:
    """A run's metrics in Ray, brought up to date by whoever follows the run's rows.

    Args:
        run: the run's folder; its URI is the tag `run`.
        session: the call of the command.
        batch_size: images of a step.
        price_per_hour: of a worker, in dollars, if it is known.
    """

    def __init__(self, run: Location, session: str, batch_size: int, price_per_hour: float | None):
        self._run, self._session = run.retried(0), session
        self._batch_size, self._price = batch_size, price_per_hour
        self._metrics: dict[str, Counter | Gauge] = {}
        self._counted: dict[str, float] = {}
        self._ledger: list[Point] = []
        self._push_at = self._read_at = 0.0
        self._given_up = False

    def update(self, rows: Sequence[Row], last: bool = False) -> None:
        """Brings the metrics to what the rows and the ledger tell.

        Seldom, so call it at will; but the last call counts. What goes wrong ends the metrics, and
        nothing else.
        """
        now = time.monotonic()
        if self._given_up or (now < self._push_at and not last):
            return
        self._push_at = now + PUSH_SECONDS
        try:
            if now >= self._read_at or last:
                self._read_ledger(beside_seconds_of(rows))
            for point in (*points_of_rows(rows, self._session, self._batch_size), *self._ledger):
                self._set(point)
        # Whatever it is: the run is worth more than its metrics.
        except Exception:
            logger.warning("no more metrics for Prometheus from here on", exc_info=True)
            self._given_up = True

    def _read_ledger(self, beside_seconds: float) -> None:
        began = time.monotonic()
        try:
            ledger = read_ledger(self._run)
            self._ledger = list(points_of_ledger(ledger, self._price, beside_seconds))
        except ExpectedError as error:
            # The next look may succeed, and the training is what matters.
            logger.debug("the ledger can't be read for the metrics: %s", error)
        ended = time.monotonic()
        self._read_at = ended + (ended - began) / LEDGER_SHARE

    def _set(self, point: Point) -> None:
        tags = {"run": self._run.uri, **point.tags}
        metric = self._metric(point.name)
        if isinstance(metric, Gauge):
            metric.set(point.value, tags)
            return
        more = point.value - self._counted.get(point.name, 0.0)
        # Ray's counters take no zero. What was lost may turn out to be less, once it is known which
        # checkpoint the next group goes on from.
        if more > 0:
            metric.inc(more, tags)
            self._counted[point.name] = point.value

    def _metric(self, name: str) -> Counter | Gauge:
        """Not made before there is a value: by then Ray is connected."""
        if name not in self._metrics:
            known = next(metric for metric in METRICS if metric.name == name)
            kind = Counter if known.kind == "counter" else Gauge
            self._metrics[name] = kind(name, known.description, known.tags)
        return self._metrics[name]
