"""Shows a running job: a bar on a terminal, plain lines in a job's log."""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from cat_ray.errors import ExpectedError, printable
from cat_ray.operations.journal import EVENT, Row, read_rows
from cat_ray.storage import Location

LOCAL_POLL_SECONDS = 0.5
REMOTE_POLL_SECONDS = 5.0

logger = logging.getLogger(__name__)


def describe(row: Row, total_images: int) -> str | None:
    """One row of `metrics.jsonl` as a line for a person, or None where there is nothing to say."""
    at = f"{row['images']:>9,} images"
    if row["kind"] == "train":
        eta = int(row["eta_seconds"])
        return (
            f"{at} {row['images'] / total_images:4.0%}  D {row['d_loss']:.3f}  "
            f"G {row['g_loss']:.3f}  R1 {row['r1']:.3f}  R2 {row['r2']:.3f}  "
            f"consistency {row['consistency']:.3f}  "
            + (f"alignment {row['alignment']:.3f}  " if "alignment" in row else "")
            + f"{row['images_per_second']:.0f} images/s  "
            f"data wait {row['data_wait_share']:.1%}  ETA {eta // 60}:{eta % 60:02d}"
        )
    if row["kind"] == "evaluation":
        return (
            f"{at}  evaluation of {row['samples']} samples: "
            f"class accuracy {row['class_accuracy']:.3f}  "
            f"spread within a class {row['within_class_spread']:.2f} of the real  "
            f"recall {row['recall']:.3f}  precision {row['precision']:.3f}  "
            f"Frechet distance (pixel PCA, not FID) {row['frechet_pixel_pca']:.2f}"
        )
    if row["kind"] == "measured":
        metric, best = row["metric"], row["checkpoint"] in row["best"][:1]
        found = [f"{name} {row[name]:.3f}" for name in ("precision", "recall") if name in row]
        told = "  ".join([f"{metric} {row[metric]:.4g}", *found])
        return f"{at}  checkpoint measured: {told}{'  the best so far' if best else ''}"
    if row["kind"] == "checkpoint":
        return f"{at}  saved {row['location']} in {row['seconds']:.1f} s"
    if row["kind"] == "broken":
        return f"{at}  skipped {len(row['samples'])} broken samples: {'; '.join(row['samples'])}"
    if row["kind"] == EVENT:
        return f"{at}  {row['message']}"
    return None


class Progress:
    """Follows the rows that a session writes, from a thread, for as long as the block lasts.

    Args:
        run: the run's folder.
        session: the call of the command.
        total_images: the run's length.
        also: is told all of the run's rows at every look, and which look is the last.
    """

    def __init__(
        self,
        run: Location,
        session: str,
        total_images: int,
        also: Callable[[Sequence[Row], bool], None] = lambda rows, last: None,
    ):
        self._run = run.retried(0)
        self._also = also
        self._session = session
        self._total_images = total_images
        self._shown: set[str] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._console = Console(soft_wrap=True, highlight=False)
        self._bar = Bar(
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} images"),
            BarColumn(),
            TextColumn("{task.percentage:.0f}%"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total_images)

    def __enter__(self) -> "Progress":
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._show(last=True)
        self._bar.stop()

    def _follow(self) -> None:
        local = self._run.local_path is not None
        while not self._stopped.wait(LOCAL_POLL_SECONDS if local else REMOTE_POLL_SECONDS):
            self._show()

    def _show(self, last: bool = False) -> None:
        try:
            rows = read_rows(self._run)
        except ExpectedError as error:
            # The next look may succeed, and the training is what matters.
            level = logging.WARNING if last else logging.DEBUG
            logger.log(level, "the run's figures can't be shown: %s", error)
            return
        self._also(rows, last)
        for row in rows:
            # After a restart some rows are gone and others come in their place.
            text = json.dumps(row)
            if row["session"] != self._session or text in self._shown:
                continue
            self._shown.add(text)
            try:
                line = describe(row, self._total_images)
            except (KeyError, TypeError, ValueError) as error:
                logger.debug("a row that can't be shown: %r", error)
                continue
            if line is not None:
                self._console.print(printable(line), markup=False)
            if row["kind"] != "measured":
                self._bar.update(self._task, completed=row["images"])
