"""Which samples and which noise each worker trained on, written down: the proof of "once each".

`samples/<group>-<rank>.jsonl` has a row for each step of a worker. Work that was lost is in it as
well; `trained_on` leaves it out.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cat_ray.operations.lines import Lines
from cat_ray.operations.telling import Tell, at_once
from cat_ray.storage import Location

SAMPLES = "samples"


class SampleKeys:
    """One worker's record, from its worker group's start; `tell` writes its rows."""

    def __init__(self, run: Location, worker_group: str, rank: int, tell: Tell = at_once):
        self._lines = Lines(run / SAMPLES / f"{worker_group}-{rank:04d}.jsonl", tell)

    def add(self, images: int, lanes: range, keys: np.ndarray, noise: np.ndarray) -> None:
        """A step's samples and latents, lane after lane; `images` seen before it."""
        keys_of = keys.reshape(len(lanes), -1).tolist()
        noise_of = noise.reshape(len(lanes), -1)
        by_lane = {
            lane: [hashlib.sha256(noise_of[place].tobytes()).hexdigest()[:16], *keys_of[place]]
            for place, lane in enumerate(lanes)
        }
        self._lines.append(json.dumps({"images": images, "lanes": by_lane}))


@dataclass(frozen=True)
class Trained:
    """What a run was trained on: keys of samples in the order of the stream, a hash of noise."""

    keys: tuple[str, ...]
    noise: str


def trained_on(run: Location, starts: Sequence[tuple[str, int]]) -> Trained:
    """What went into the run's present state.

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
            for lane, entry in row["lanes"].items():
                if int(lane) in lanes:
                    raise ValueError(f"lane {lane} at {row['images']:,} images was done twice")
                lanes[int(lane)] = entry
    keys: list[str] = []
    noise = hashlib.sha256()
    all_lanes = list(range(len(steps.get(0, ()))))
    for images in sorted(steps):
        lanes = steps[images]
        if images != len(keys) or sorted(lanes) != all_lanes:
            raise ValueError(f"samples are missing at {len(keys):,} images")
        for lane in sorted(lanes):
            noise.update(lanes[lane][0].encode())
            keys += lanes[lane][1:]
    return Trained(tuple(keys), noise.hexdigest())


def repeated(trained: Trained, epoch_images: int) -> list[str]:
    """The samples that came more than once in an epoch, none if each came once."""
    epochs = (
        trained.keys[first : first + epoch_images]
        for first in range(0, len(trained.keys), epoch_images)
    )
    return [key for epoch in epochs for key, times in Counter(epoch).items() if times > 1]


def _rows(run: Location, group: str) -> Iterator[dict]:
    folder = run / SAMPLES
    for name in sorted(folder.sizes()):
        if name.startswith(f"{group}-"):
            # A killed worker may leave a last line without its end.
            for line in (folder / name).read().split(b"\n")[:-1]:
                yield json.loads(line)
