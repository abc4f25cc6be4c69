"""`cat-ray bench checkpoint`: how long a save holds training up, against a save that is waited for.

Both are the same save of the same state by the same writer, in one run. A save is copied while the
next step computes its gradients: the benchmark computes as well, for a fifth of a second.
"""

import json
import statistics
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

from cat_ray.checkpoint.layout import FOLDER, GENERATOR, State
from cat_ray.checkpoint.write import CheckpointWriter, Slice
from cat_ray.errors import BadInput
from cat_ray.storage import Location

BYTES_PER_ELEMENT = 4
TENSORS = 100


STEP_SECONDS = 0.2
WIDTH = 512


@dataclass(frozen=True)
class Saves:
    """Seconds of each repetition.

    Attributes:
        megabytes: of the state.
        waited: from the call until the manifest is there: a synchronous save.
        stalled: how long training stands still in all, before and after one step's gradients.
    """

    megabytes: int
    waited: tuple[float, ...]
    stalled: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median stall as a share of the median synchronous save."""
        return statistics.median(self.stalled) / statistics.median(self.waited)


def bench_checkpoint(folder: Location, megabytes: int, repetitions: int) -> Saves:
    """Saves a state of random numbers into a folder, again and again, and removes it.

    Raises:
        BadInput: the folder isn't empty.
    """
    if not folder.is_empty():
        raise BadInput(f"{folder.uri} isn't empty: choose another folder")
    length = megabytes * 10**6 // BYTES_PER_ELEMENT // TENSORS
    slices = [
        Slice(GENERATOR, f"tensor-{place}", (length,), 0, torch.randn(length))
        for place in range(TENSORS)
    ]
    writer = CheckpointWriter(folder, uuid.uuid4().hex[:6], rank=0, world_size=1)
    waited, stalled, weights = [], [], torch.randn(WIDTH, WIDTH)
    # The first one is not counted: it makes the buffer, which later ones use again.
    for repetition in range(repetitions + 1):
        began = time.perf_counter()
        writer.save(State(repetition, 0, "", "", {}), slices)
        saved = writer.wait()[0]
        if repetition:
            waited.append(time.perf_counter() - began)
        saved.location.delete_folder()
        writer.save(State(repetition, 0, "", "", {}), slices)
        _step(weights)
        writer.settle()
        saved = writer.wait()[0]
        if repetition:
            stalled.append(saved.stall_seconds)
        saved.location.delete_folder()
    (folder / FOLDER).delete_folder()
    return Saves(megabytes, tuple(waited), tuple(stalled))


def _step(weights: torch.Tensor) -> None:
    """Computes for as long as a quick step needs for its gradients."""
    until = time.perf_counter() + STEP_SECONDS
    while time.perf_counter() < until:
        weights @ weights


def bench_table(saves: Saves) -> Iterator[Table]:
    """The figures, for a person: medians with the range."""
    table = Table("", "median", "least", "most", title=f"{saves.megabytes} MB")
    for name, seconds in (("synchronous save", saves.waited), ("training stands", saves.stalled)):
        ordered = [statistics.median(seconds), min(seconds), max(seconds)]
        table.add_row(name, *(f"{value:.3f} s" for value in ordered))
    table.add_row("ratio", f"{saves.ratio:.1%}", "", "")
    yield table


def to_json(saves: Saves) -> str:
    """The same for scripts."""
    return json.dumps({**asdict(saves), "ratio": saves.ratio}, indent=1)
