"""A checkpoint in use isn't deleted, and nobody is left with half of one."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from cat_ray.checkpoint import retain
from cat_ray.checkpoint.layout import (
    FOLDER,
    GENERATOR,
    MANIFEST,
    State,
    folder_name,
    images_of,
)
from cat_ray.checkpoint.read import verify
from cat_ray.checkpoint.retain import drop_old, lease, leased
from cat_ray.checkpoint.write import CheckpointWriter, Slice
from cat_ray.errors import BadInput
from cat_ray.storage import Location, locate

GROUP = "3f9a1c"
WAIT_SECONDS = 60


def save(run: Location, images: int) -> Location:
    writer = CheckpointWriter(run, GROUP, 0, 1)
    slices = [Slice(GENERATOR, "weight", (7,), 0, torch.full((7,), float(images)))]
    writer.save(State(images, 0, "digest", "", {}), slices)
    return writer.wait()[0].location


def place(run: Location, images: int) -> Location:
    return run / FOLDER / folder_name(images, GROUP)


def left(run: Location) -> list[int]:
    """The numbers of images of all folders, whole or not."""
    return [images_of(folder.name) for folder in (run / FOLDER).folders()]


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


def test_a_leased_checkpoint_stays_until_its_reader_is_done(run):
    used = save(run, 32)
    save(run, 64)
    with lease(used):
        drop_old(run, 1)
        assert left(run) == [32, 64]
        assert verify(used) == []
    assert not leased(used)
    drop_old(run, 1)
    assert left(run) == [64]


def test_a_lease_among_several_is_enough(run):
    used = save(run, 32)
    save(run, 64)
    with lease(used):
        with lease(used):
            pass
        with lease(used, seconds=-1):
            drop_old(run, 1)
    assert left(run) == [32, 64]


def test_a_lease_that_has_run_out_holds_nothing(run, monkeypatch):
    used = save(run, 32)
    save(run, 64)
    now = retain.time.time()
    with lease(used, seconds=100):
        monkeypatch.setattr(retain.time, "time", lambda: now + 99)
        drop_old(run, 1)
        assert left(run) == [32, 64]
        monkeypatch.setattr(retain.time, "time", lambda: now + 102)
        drop_old(run, 1)
        assert left(run) == [64]


def test_a_reader_that_fails_leaves_no_lease_behind(run):
    used = save(run, 32)
    with pytest.raises(KeyError), lease(used):
        raise KeyError
    assert not leased(used)
    assert not [name for name in used.sizes() if name.startswith("lease-")]


def test_a_lease_of_a_checkpoint_that_is_gone_is_refused(run):
    with (
        pytest.raises(BadInput, match="was deleted while it was being opened: try again"),
        lease(place(run, 32)),
    ):
        raise AssertionError("it was opened")


def test_where_no_lease_can_be_written_reading_goes_on_with_a_warning(run, monkeypatch, caplog):
    used = save(run, 32)

    def refused(found: Location, content: bytes) -> None:
        raise BadInput(f"storage failed at {found.uri}")

    monkeypatch.setattr(Location, "write", refused)
    with lease(used):
        assert verify(used) == []
    assert "a training run may delete what is being read: storage failed at" in caplog.text
    with pytest.raises(KeyError), lease(used):
        raise KeyError


def test_an_unfinished_checkpoint_in_use_stays_too(run):
    used = save(run, 32)
    save(run, 64)
    with lease(used):
        (used / MANIFEST).delete()
        drop_old(run, 1)
        assert left(run) == [32, 64]


# A reader that comes while the checkpoint is deleted: every order of their operations.


@dataclass(frozen=True)
class Deleted(Location):
    """The folder as the deleter sees it: it tells before each operation on storage."""

    turns: "Turns" = field(default=None)  # pyright: ignore[reportArgumentType]

    def read(self) -> bytes:
        self.turns.before_deleter(f"read {self.name}")
        return super().read()

    def write(self, content: bytes) -> None:
        self.turns.before_deleter(f"write {self.name}")
        super().write(content)

    def size(self) -> int | None:
        self.turns.before_deleter(f"look for {self.name}")
        return super().size()

    def sizes(self) -> dict[str, int]:
        self.turns.before_deleter(f"list {self.name}")
        return super().sizes()


@dataclass(frozen=True)
class Leased(Location):
    """The folder as the reader sees it: it writes its lease and looks for the manifest in turn."""

    turns: "Turns" = field(default=None)  # pyright: ignore[reportArgumentType]

    def write(self, content: bytes) -> None:
        self.turns.wait_for("write")
        super().write(content)
        self.turns.done("write")

    def exists(self) -> bool:
        # It looks for the manifest, and for its lease to delete it: only the first is waited for.
        if self.name == MANIFEST:
            self.turns.wait_for("look")
        return super().exists()


class Turns:
    """Lets a reader write before the deleter's n-th operation and look before its m-th.

    What the reader's look leads to (it holds the checkpoint, or gives up and deletes its lease) is
    done before the deleter goes on.
    """

    def __init__(self, write: int, look: int):
        self.operations: list[str] = []
        self._at = {"write": write, "look": look}
        self._begin = {turn: threading.Event() for turn in self._at}
        self._end = {turn: threading.Event() for turn in self._at}

    def before_deleter(self, operation: str) -> None:
        for turn, at in self._at.items():
            if at == len(self.operations):
                self.take(turn)
        self.operations.append(operation)

    def take(self, turn: str) -> None:
        self._begin[turn].set()
        assert self._end[turn].wait(WAIT_SECONDS), f"the reader's {turn} hangs"

    def wait_for(self, turn: str) -> None:
        assert self._begin[turn].wait(WAIT_SECONDS), f"nobody lets the reader {turn}"

    def done(self, turn: str) -> None:
        self._end[turn].set()


def race(run: Location, write: int, look: int) -> tuple[str, list[str]]:
    """Deletes a checkpoint while a reader leases it: how that ended, the deleter's operations."""
    checkpoint = save(run, 32)
    turns = Turns(write, look)
    paths = (checkpoint.filesystem, checkpoint.path, checkpoint.uri)
    told: list[str] = []
    over = threading.Event()

    def read() -> None:
        try:
            with lease(Leased(*paths, turns=turns)):
                told.append("held")
                turns.done("look")
                assert over.wait(WAIT_SECONDS)
        except BadInput as error:
            told.append(str(error))
        turns.done("look")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deleter = Deleted(*paths, turns=turns)
    if not leased(deleter):
        retain._delete(deleter)
    for turn in ("write", "look"):
        # Where the deleter was done before the reader's turn came.
        turns.take(turn)
    if told == ["held"]:
        assert verify(checkpoint) == [], f"{turns.operations}: a lease on a deleted checkpoint"
    over.set()
    reader.join(WAIT_SECONDS)
    assert not reader.is_alive()
    return told[0], turns.operations


def test_a_reader_holds_a_whole_checkpoint_or_is_told_whenever_it_comes(run):
    save(run, 64)
    alone = race(run, write=10**9, look=10**9)[1]
    operations = len(alone)
    assert f"write {MANIFEST}" not in alone
    refused = f"{place(run, 32).uri} was deleted while it was being opened: try again"
    outcomes = set()
    # A lease that is found gives the deleter a few operations more.
    for write in range(operations + 5):
        for look in range(write, operations + 5):
            told, after = race(run, write, look)
            assert told in ("held", refused), f"{told}; {after}"
            outcomes.add((told, f"write {MANIFEST}" in after))
            drop_old(run, 1)
            assert left(run) == [64], f"what was left is in the way: {after}"
    # Among them: the reader was there first, came in time to stop the deletion, came too late.
    assert outcomes >= {("held", False), ("held", True), (refused, False)}
