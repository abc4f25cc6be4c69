"""Run by test_atomic_checkpoints.py: dies of SIGKILL at every moment of a save, or of a deletion.

Each death has a process and a run's folder, `RUNS/<place>-<moment>`, of its own. The place is that
of a file in the order of `FOLDER/files.json`, in which an undisturbed process tells what it did.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from cat_ray.checkpoint.layout import (
    FOLDER,
    GENERATOR,
    GENERATOR_MOMENTS,
    State,
    folder_name,
    part_file,
)
from cat_ray.checkpoint.retain import drop_old
from cat_ray.checkpoint.write import CheckpointWriter, Slice
from cat_ray.storage import Location, locate

ENDPOINT = os.environ.get("ENDPOINT")
GROUPS = (GENERATOR, GENERATOR_MOMENTS)
COUNT = 7


class Death:
    """Comes at one moment in the life of one file; files are counted, and told by name."""

    def __init__(self, place: int | None, moment: str):
        self.files: list[str] = []
        self._place, self._moment = place, moment

    def around(self, name: str, act: Callable[[], object], draft: Path | None = None) -> None:
        """Puts a file in its place, or deletes it; what is written of it before is in `draft`."""
        if self._place == len(self.files):
            if self._moment == "halfway" and draft is not None:
                os.truncate(draft, draft.stat().st_size // 2)
            if self._moment != "after":
                os.kill(os.getpid(), signal.SIGKILL)
        act()
        if self._place == len(self.files):
            os.kill(os.getpid(), signal.SIGKILL)
        self.files.append(name)


def save(run: Location, images: int, group: str, order: list[int]) -> None:
    """One writer for each rank. They write one after another, so that every process does alike."""
    workers = len(order)
    writers = {rank: CheckpointWriter(run, group, rank, workers) for rank in order}
    for rank in order:
        first, beyond = COUNT * rank // workers, COUNT * (rank + 1) // workers
        values = torch.full((beyond - first,), float(images))
        slices = [Slice(kind, "weight", (COUNT,), first, values) for kind in GROUPS]
        writers[rank].save(State(images, 0, "digest", "", {}), slices)
        part = run / FOLDER / folder_name(images, group) / part_file(rank, workers)
        while not part.exists():
            time.sleep(0.002)
    for writer in writers.values():
        writer.wait()


def save_and_die(run: Location, order: list[int], death: Death) -> None:
    """A good save, and then the one that is killed."""
    save(run, 32, "000001", order)
    replace, write, upload = Path.replace, Location.write, Location.upload
    if run.local_path is not None:
        Path.replace = lambda draft, place: death.around(
            Path(place).name, lambda: replace(draft, place), draft
        )
    else:
        Location.write = lambda place, content: death.around(
            place.name, lambda: write(place, content)
        )
        Location.upload = lambda place, source: death.around(
            place.name, lambda: upload(place, source)
        )
    save(run, 64, "000002", order)


def delete_and_die(run: Location, order: list[int], death: Death) -> None:
    """Three saves, of which the newest stays."""
    for images in (32, 64, 96):
        save(run, images, "000001", order)
    delete = Location.delete
    Location.delete = lambda place: death.around(place.name, lambda: delete(place))
    drop_old(run, 1)


ACTS = {
    "save": (save_and_die, ("halfway", "before", "after")),
    # Object storage knows no half files, and before one is just after the one before.
    "upload": (save_and_die, ("after",)),
    "delete": (delete_and_die, ("before", "after")),
}


def forked(act: Callable[[], None]) -> int:
    """Runs in a process of its own, which has everything imported already; how that ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def main() -> None:
    folder, runs, order = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[4])
    act, moments = ACTS[sys.argv[3]]

    def one(name: str, death: Death) -> None:
        act(locate(f"{runs}/{name}", ENDPOINT), order, death)

    def undisturbed() -> None:
        death = Death(None, "")
        one("undisturbed", death)
        (folder / "files.json").write_text(json.dumps(death.files))

    # Nothing here starts a thread: those would be missing in the children.
    torch.set_num_threads(1)
    assert forked(undisturbed) == 0
    for place in range(len(json.loads((folder / "files.json").read_text()))):
        for moment in moments:
            status = forked(partial(one, f"{place}-{moment}", Death(place, moment)))
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            assert killed, f"{place}-{moment} ended with {status}"


if __name__ == "__main__":
    main()
