"""What a run writes down as it goes: rows of JSON, and TensorBoard.

Trackers, where there are any, are told the same numbers.
"""

import hashlib
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cat_ray.json_text import parse_object
from cat_ray.operations.lines import Lines, read_lines
from cat_ray.operations.telling import Tell, at_once
from cat_ray.operations.trackers import Tracker
from cat_ray.storage import Location

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

METRICS = "metrics.jsonl"
MEASURED = "measured.jsonl"
TENSORBOARD = "tensorboard"
EVENT = "event"
IMAGES = "images"
KEYS = (("kind", str), ("session", str), (IMAGES, int))

Row = dict[str, Any]


def read_rows(run: Location) -> list[Row]:
    """The rows of a run's `metrics.jsonl`, then those of its `measured.jsonl`, if there are any."""
    return [row for name in (METRICS, MEASURED) for row in read_lines(run / name, _parse)]


def _parse(line: bytes) -> Row:
    row = parse_object(line)
    if any(type(row.get(key)) is not kind for key, kind in KEYS):
        raise ValueError("it is no row of a run's figures")
    return row


class Journal:
    """Appends rows of figures to a file that has one writer: `metrics.jsonl` is the first worker's,
    `measured.jsonl`, of measurements beside the training, the driver's.

    Rows past the place where the run goes on are dropped, but for events: their work is done again.
    Where that is None, all stay. `tell` does the writing, by default at once.
    """

    def __init__(
        self,
        run: Location,
        session: str,
        images: int | None,
        trackers: tuple[Tracker, ...] = (),
        file: str = METRICS,
        tell: Tell = at_once,
    ):
        self._run, self._session, self._trackers, self._tell = run, session, trackers, tell
        digest = hashlib.sha256(run.uri.encode()).hexdigest()[:16]
        staging = Path(tempfile.gettempdir()) / f"cat_ray-{digest}"
        self._folder = (run.local_path or staging) / TENSORBOARD
        self._suffix = f".{session}.{file.split('.')[0]}"
        self._purge_step = None if images is None else images + 1
        self._writer: SummaryWriter | None = None
        kept = "".join(
            json.dumps(row) + "\n"
            for row in read_lines(run / file, _parse)
            if images is None or row[IMAGES] <= images or row["kind"] == EVENT
        ).encode()
        self._lines = Lines(run / file, tell, kept)
        tell(lambda: (run / file).write(kept))

    def append(self, kind: str, images: int, **values: Any) -> None:
        """Writes a row; its numbers go to TensorBoard, under `kind/name`, and trackers as well."""
        row = {"kind": kind, "session": self._session, IMAGES: images, **values}
        self._lines.append(json.dumps(row))
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self._tell(lambda: self._plot(kind, images, numbers))
        for tracker in self._trackers:
            self._tell(partial(tracker.log, kind, images, numbers))
        self._tell(self._publish, (self, "tensorboard"))

    def close(self) -> None:
        """Ends the TensorBoard file and the trackers."""
        self._tell(self._end)
        self._tell(self._publish, (self, "tensorboard"))
        for tracker in self._trackers:
            self._tell(tracker.close)

    def _plot(self, kind: str, images: int, numbers: dict[str, float]) -> None:
        if self._writer is None:
            # Not above: its import takes a while.
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(
                str(self._folder), purge_step=self._purge_step, filename_suffix=self._suffix
            )
        for name, number in numbers.items():
            self._writer.add_scalar(f"{kind}/{name}", number, images)

    def _publish(self) -> None:
        """Brings TensorBoard's file to the run's storage."""
        if self._writer is not None:
            self._writer.flush()
        if self._run.local_path is None:
            for events in self._folder.glob(f"*{self._suffix}"):
                (self._run / TENSORBOARD / events.name).upload(events)

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
