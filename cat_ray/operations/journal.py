"""What a run writes down as it goes: rows of JSON and TensorBoard, local, then uploaded.

Trackers, where there are any, are told the same numbers.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from cat_ray.operations.trackers import Tracker
from cat_ray.storage import Location

METRICS = "metrics.jsonl"
MEASURED = "measured.jsonl"
TENSORBOARD = "tensorboard"
EVENT = "event"

Row = dict[str, Any]


def read_rows(run: Location) -> list[Row]:
    """The rows of a run's `metrics.jsonl`, then those of its `measured.jsonl`, if there are any."""
    return [*_rows(run / METRICS), *_rows(run / MEASURED)]


def _rows(place: Location) -> list[Row]:
    if not place.exists():
        return []
    lines = place.read().decode().splitlines()
    # A last line without its end is still being written.
    return [json.loads(line) for line in lines if line.endswith("}")]


class Journal:
    """Appends rows of figures to a file that has one writer: `metrics.jsonl` is the first worker's,
    `measured.jsonl`, of measurements beside the training, the driver's.

    Rows past the place where the run goes on are dropped, but for events: their work is done again.
    Where that is None, all stay.
    """

    def __init__(
        self,
        run: Location,
        session: str,
        images: int | None,
        trackers: tuple[Tracker, ...] = (),
        file: str = METRICS,
    ):
        from torch.utils.tensorboard.writer import SummaryWriter

        self._run = run
        self._session = session
        self._trackers = trackers
        digest = hashlib.sha256(run.uri.encode()).hexdigest()[:16]
        staging = Path(tempfile.gettempdir()) / f"cat_ray-{digest}"
        self._folder = run.local_path or staging
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file, self._suffix = file, f".{session}.{file.split('.')[0]}"
        kept = [
            row
            for row in _rows(run / file)
            if images is None or row["images"] <= images or row["kind"] == EVENT
        ]
        (self._folder / file).write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._tensorboard = SummaryWriter(
            str(self._folder / TENSORBOARD),
            purge_step=None if images is None else images + 1,
            filename_suffix=self._suffix,
        )

    def append(self, kind: str, images: int, **values: Any) -> None:
        """Writes a row; its numbers go to TensorBoard, under `kind/name`, and trackers as well."""
        row = {"kind": kind, "session": self._session, "images": images, **values}
        with (self._folder / self._file).open("a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for name, number in numbers.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", number, images)
        for tracker in self._trackers:
            tracker.log(kind, images, numbers)
        self.publish()

    def publish(self) -> None:
        """Brings what was written to the run's storage."""
        self._tensorboard.flush()
        if self._run.local_path is not None:
            return
        (self._run / self._file).upload(self._folder / self._file)
        for events in (self._folder / TENSORBOARD).glob(f"*{self._suffix}"):
            (self._run / TENSORBOARD / events.name).upload(events)

    def close(self) -> None:
        """Ends the TensorBoard file and the trackers."""
        self._tensorboard.close()
        self.publish()
        for tracker in self._trackers:
            tracker.close()
