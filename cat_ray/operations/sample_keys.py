"""Which sample each worker trained on, written down: the proof that none is lost or doubled.

`samples/<group>-<rank>.jsonl` has a row for each step of a worker. Work that was lost is in it as
well; `sample_keys` leaves it out.
"""

import json
from collections.abc import Iterator

import numpy as np

from cat_ray.storage import Location

SAMPLES = "samples"
UPLOAD_ROWS = 100


class SampleKeys:
    """One worker's record, from its worker group's start."""

    def __init__(self, run: Location, worker_group: str, rank: int):
        self._place = run / SAMPLES / f"{worker_group}-{rank:04d}.jsonl"
        self._rows: list[str] = []
        if self._place.local_path is not None:
            self._place.local_path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, images: int, lanes: range, keys: np.ndarray) -> None:
        """A step's samples, lane after lane; `images` seen before it."""
        by_lane = keys.reshape(len(lanes), -1).tolist()
        row = json.dumps({"images": images, "lanes": dict(zip(lanes, by_lane, strict=True))})
        if self._place.local_path is not None:
            with self._place.local_path.open("a") as file:
                file.write(row + "\n")
            return
        self._rows.append(row)
        if len(self._rows) % UPLOAD_ROWS == 0:
            self.close()

    def close(self) -> None:
        """Brings the last rows to the run's storage."""
        if self._rows:
            self._place.write("".join(row + "\n" for row in self._rows).encode())


def sample_keys(run: Location, starts: list[tuple[str, int]]) -> list[str]:
    """The samples that the run was trained on, in the order of the stream.

    Args:
        run: the run's folder.
        starts: the worker groups in order of time, each with the images it went on from: what an
            earlier group did beyond that was lost, and done again.

    Raises:
        ValueError: a lane of a step is missing, or was done by two workers.
    """
    steps: dict[int, dict[int, list[str]]] = {}
    for group, start in starts:
        steps = {images: lanes for images, lanes in steps.items() if images < start}
        for row in _rows(run, group):
            lanes = steps.setdefault(row["images"], {})
            for lane, keys in row["lanes"].items():
                if int(lane) in lanes:
                    raise ValueError(f"lane {lane} at {row['images']:,} images was done twice")
                lanes[int(lane)] = keys
    ordered: list[str] = []
    for images in sorted(steps):
        lanes = steps[images]
        if images != len(ordered) or sorted(lanes) != list(range(len(lanes))):
            raise ValueError(f"samples are missing at {len(ordered):,} images")
        ordered += [key for lane in sorted(lanes) for key in lanes[lane]]
    return ordered


def _rows(run: Location, group: str) -> Iterator[dict]:
    folder = run / SAMPLES
    for name in sorted(folder.sizes()):
        if name.startswith(f"{group}-"):
            # A killed worker may leave a last line without its end.
            for line in (folder / name).read().split(b"\n")[:-1]:
                yield json.loads(line)
