"""Saves go on behind training's back: what they copy, whom they wait for, what stops them."""

import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cat_ray import storage_errors
from cat_ray.checkpoint import write
from cat_ray.checkpoint.commit import commit_abandoned, commit_if_whole
from cat_ray.checkpoint.layout import (
    FOLDER,
    GENERATOR,
    GENERATOR_MOMENTS,
    MANIFEST,
    STATE,
    State,
    folder_name,
    part_file,
    read_manifest,
    slice_file,
)
from cat_ray.checkpoint.read import newest, newest_sound, read_state, read_tensors
from cat_ray.checkpoint.write import CheckpointWriter, GroupFailed, Slice
from cat_ray.errors import BadInput, Damaged, StorageDown, StorageFull
from cat_ray.storage import Location, locate

GROUP = "3f9a1c"
GROUPS = (GENERATOR, GENERATOR_MOMENTS)
WAIT_SECONDS = 60


def state(images: int) -> State:
    return State(images, 0, "digest", "", {})


def slices(values: Tensor, rank: int = 0, workers: int = 1) -> list[Slice]:
    """A worker's share of these values, in two groups."""
    count = len(values)
    first, beyond = count * rank // workers, count * (rank + 1) // workers
    own = values[first:beyond]
    return [Slice(group, "weight", (count,), first, own) for group in GROUPS]


def values(seed: int = 0) -> Tensor:
    return torch.randn(7, generator=torch.Generator().manual_seed(seed))


def save(run: Location, images: int, seed: int = 0, group: str = GROUP) -> Location:
    """One worker saves, and waits for it."""
    writer = CheckpointWriter(run, group, 0, 1)
    writer.save(state(images), slices(values(seed)))
    return writer.wait()[0].location


def place(run: Location, images: int) -> Location:
    return run / FOLDER / folder_name(images, GROUP)


def local(found: Location) -> Path:
    assert found.local_path is not None
    return found.local_path


def holds(checkpoint: Location, expected: Tensor) -> bool:
    return all(torch.equal(read_tensors(checkpoint, group)["weight"], expected) for group in GROUPS)


class Thread:
    """Does something beside the test; it must end by itself."""

    def __init__(self, act: Callable[[], object]):
        self.error: BaseException | None = None
        self._act = act
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self.error = error

    def go_wrong(self, seconds: float) -> None:
        """Gives it time to go on where it must not; to be right it needs none."""
        self._thread.join(seconds)

    def end(self) -> BaseException | None:
        """What it raised."""
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive(), "it hangs"
        return self.error


@pytest.fixture(autouse=True)
def nobody_left_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends what a test that fails has under way, which would keep the interpreter from ending."""
    made: list[CheckpointWriter] = []
    plain = CheckpointWriter.__init__

    def noted(writer: CheckpointWriter, *arguments: object, **options: object) -> None:
        plain(writer, *arguments, **options)  # pyright: ignore[reportArgumentType]
        made.append(writer)

    monkeypatch.setattr(CheckpointWriter, "__init__", noted)
    yield
    for writer in made:
        writer.give_up()


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doesn't pause for long between a refused write and the next."""
    monkeypatch.setattr(storage_errors, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(storage_errors, "LONGEST_PAUSE_SECONDS", 0.001)


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch, events: list[str]) -> Iterator[threading.Event]:
    """Slices aren't written to disk before the event is set; it is at the end of the block."""
    gate, plain = threading.Event(), safetensors.torch.save_file

    def after_gate(held: dict[str, Tensor], path: Path) -> None:
        assert gate.wait(WAIT_SECONDS)
        plain(held, path)
        events.append("written")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", after_gate)
        try:
            yield gate
        finally:
            gate.set()


# Behind training's back.


def test_what_is_saved_is_what_was_there_when_the_save_was_settled(run, monkeypatch):
    writer, weights = CheckpointWriter(run, GROUP, 0, 1, pending=2), values()
    with held_back(monkeypatch, []):
        for images, seed in ((32, 0), (64, 1)):
            weights.copy_(values(seed))
            writer.save(state(images), slices(weights))
            writer.settle()
        weights.zero_()
    first, second = writer.wait()
    assert holds(first.location, values(0))
    assert holds(second.location, values(1))


def test_a_buffer_that_is_used_again_spoils_no_save_under_way(run):
    writer, weights = CheckpointWriter(run, GROUP, 0, 1, pending=1), values()
    for images in range(32, 32 * 20, 32):
        weights.copy_(values(images))
        writer.save(state(images), slices(weights))
        writer.settle()
    for saved in writer.wait():
        assert holds(saved.location, values(saved.images))


def test_values_may_change_only_after_the_copy_was_taken(run, monkeypatch):
    gate, plain = threading.Event(), write._copy

    def after_gate(*arguments):
        assert gate.wait(WAIT_SECONDS)
        return plain(*arguments)

    monkeypatch.setattr(write, "_copy", after_gate)
    writer, weights = CheckpointWriter(run, GROUP, 0, 1), values()
    writer.save(state(32), slices(weights))
    changing = threading.Thread(target=lambda: (writer.settle(), weights.zero_()))
    changing.start()
    # While the copy is held up, whoever wants to change the values waits.
    changing.join(0.2)
    assert changing.is_alive() and bool(weights.any())
    gate.set()
    changing.join()
    assert holds(writer.wait()[0].location, values())


def test_parts_may_change_their_size_from_save_to_save(run):
    writer = CheckpointWriter(run, GROUP, 0, 1)
    for images, count in ((32, 7), (64, 3), (96, 9)):
        writer.save(state(images), slices(values()[:3].repeat(3)[:count]))
    for saved, count in zip(writer.wait(), (7, 3, 9), strict=True):
        assert holds(saved.location, values()[:3].repeat(3)[:count])


@pytest.mark.parametrize("pending", [1, 2])
def test_no_more_saves_than_allowed_wait_for_the_disk(run, monkeypatch, pending):
    events: list[str] = []
    writer = CheckpointWriter(run, GROUP, 0, 1, pending=pending)
    with held_back(monkeypatch, events) as gate:
        for place in range(pending):
            writer.save(state(32 * (place + 1)), slices(values()))
        assert events == [], "training waited for the disk"

        def one_more() -> None:
            writer.save(state(32 * (pending + 1)), slices(values()))
            events.append("taken")

        another = Thread(one_more)
        another.go_wrong(0.2)
        assert events == []
        gate.set()
        assert another.end() is None
    assert len(writer.wait()) == pending + 1
    assert events.index("taken") >= len(GROUPS)


def test_no_worker_waits_for_another_before_it_trains_on(run):
    # The other one never saves: this one's part is written, and it may save again.
    writer = CheckpointWriter(run, GROUP, 0, 2)
    for images in (32, 64):
        writer.save(state(images), slices(values(), 0, 2))
    assert writer.finished() == []
    writer.give_up()


def test_a_save_that_is_done_is_told_once_with_where_it_is(run):
    writer = CheckpointWriter(run, GROUP, 0, 1)
    writer.save(state(32), slices(values()))
    (saved,) = writer.wait()
    assert (saved.images, saved.location) == (32, place(run, 32))
    assert writer.finished() == writer.wait() == []


def test_slices_have_the_permissions_of_any_other_new_file(run):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in local(save(run, 32)).iterdir()}
    assert len(modes) == 1


# All workers' parts.


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_checkpoint_is_there_when_the_last_part_is_whoever_wrote_it(run, order):
    writers = [CheckpointWriter(run, GROUP, rank, 3) for rank in range(3)]
    for rank in order:
        assert newest(run) is None
        writers[rank].save(state(32), slices(values(), rank, 3))
        if rank != 0:
            writers[rank].wait()
    (saved,) = writers[0].wait()
    assert newest(run) == saved.location
    assert holds(saved.location, values())


def test_the_worker_that_commits_tells_so_and_no_other(run):
    told: list[tuple[int, Location]] = []

    def writer(rank: int) -> CheckpointWriter:
        def committed(checkpoint: Location) -> None:
            assert read_manifest(checkpoint) is not None
            told.append((rank, checkpoint))

        return CheckpointWriter(run, GROUP, rank, 2, committed=committed)

    writers = [writer(0), writer(1)]
    for rank, one in enumerate(writers):
        one.save(state(32), slices(values(), rank, 2))
    for one in writers:
        one.wait()
    assert told == [(0, place(run, 32))]


def test_whoever_commits_and_however_often_writes_the_same(run):
    checkpoint = save(run, 32)
    before = (checkpoint / MANIFEST).read()
    assert commit_if_whole(checkpoint)
    (checkpoint / MANIFEST).delete()
    assert commit_if_whole(checkpoint)
    assert (checkpoint / MANIFEST).read() == before


@pytest.mark.parametrize("missing", [STATE, part_file(0, 2), part_file(1, 2)])
def test_nobody_commits_what_is_not_whole(run, missing):
    writers = [CheckpointWriter(run, GROUP, rank, 2) for rank in range(2)]
    for rank, writer in enumerate(writers):
        writer.save(state(32), slices(values(), rank, 2))
    checkpoint = writers[0].wait()[0].location
    (checkpoint / MANIFEST).delete()
    (checkpoint / missing).delete()
    assert not commit_if_whole(checkpoint)
    assert newest(run) is None


def test_nobody_commits_a_damaged_part_and_the_next_start_only_warns_of_it(run, caplog):
    checkpoint = save(run, 32)
    (checkpoint / MANIFEST).delete()
    content = (checkpoint / part_file(0, 1)).read()
    (checkpoint / part_file(0, 1)).write(content.replace(b"weight", b"height", 1))
    with pytest.raises(Damaged, match=f"{part_file(0, 1)} is damaged"):
        commit_if_whole(checkpoint)
    commit_abandoned(run)
    assert f"{part_file(0, 1)} is damaged" in caplog.text
    assert newest(run) is None


def test_a_group_that_failed_ends_the_wait_for_its_parts_and_commits_nothing(run):
    writer = CheckpointWriter(run, GROUP, 0, 2)
    writer.save(state(32), slices(values(), 0, 2))
    waiting = Thread(writer.wait)
    writer.give_up()
    assert isinstance(waiting.end(), GroupFailed)
    assert newest(run) is None


def test_groups_that_save_after_as_many_images_have_a_checkpoint_each(run):
    one = save(run, 64, seed=1, group="000001")
    before = {path.name: path.read_bytes() for path in local(one).iterdir()}
    (one / slice_file(GENERATOR, 0, 1)).write(b"damage")
    other = save(run, 64, seed=2, group="000000")
    # The work since is done again: the damaged one is no longer in the way.
    assert newest(run) == other
    (one / slice_file(GENERATOR, 0, 1)).write(before[slice_file(GENERATOR, 0, 1)])
    assert {path.name: path.read_bytes() for path in local(one).iterdir()} == before
    assert holds(one, values(1))
    assert holds(other, values(2))


# Storage that refuses, and full disks.


def test_writes_that_are_refused_for_a_while_are_tried_again(run, quick, caplog):
    writer = CheckpointWriter(run, GROUP, 0, 1)
    writer.refuse(3)
    writer.save(state(32), slices(values()))
    (saved,) = writer.wait()
    assert holds(saved.location, values())
    assert any("refused by a drill; retrying" in message for message in caplog.messages)
    assert any("the storage answers again" in message for message in caplog.messages)


@pytest.mark.parametrize("failing", ["sizes", "read", "write"])
def test_a_commit_that_storage_refuses_is_tried_again(run, quick, monkeypatch, failing):
    plain, refusals = getattr(Location, failing), iter(range(3))

    def refused_at_first(found: Location, *content: bytes) -> object:
        # What a commit reads and writes, beside what the parts' writers did before.
        commits = found.name in (MANIFEST, part_file(0, 1)) or failing == "sizes"
        writes_part = failing == "write" and found.name != MANIFEST
        if commits and not writes_part and next(refusals, None) is not None:
            raise StorageDown(f"storage failed at {found.uri}")
        return plain(found, *content)

    writer = CheckpointWriter(run, GROUP, 0, 1)
    monkeypatch.setattr(Location, failing, refused_at_first)
    writer.save(state(32), slices(values()))
    (saved,) = writer.wait()
    assert next(refusals, None) is None, "nothing was refused"
    assert holds(saved.location, values())


def test_storage_that_refuses_for_too_long_ends_the_save_and_leaves_the_previous(run, quick):
    previous = save(run, 32)
    writer = CheckpointWriter(run, GROUP, 0, 1, retry_seconds=0.01)
    writer.refuse(10**9)
    writer.save(state(64), slices(values()))
    error = Thread(writer.wait).end()
    assert isinstance(error, StorageDown)
    assert str(error) == f"storage failed at {place(run, 64).uri}/{STATE}: refused by a drill"
    assert newest_sound(run) == previous


@pytest.mark.parametrize("ask", ["save", "finished", "wait"])
def test_a_save_that_failed_is_told_by_whatever_is_called_next(run, quick, ask):
    writer = CheckpointWriter(run, GROUP, 0, 1, retry_seconds=0)
    writer.refuse(10**9)
    writer.save(state(32), slices(values()))
    # Its thread is one: with the next task done, so is the save.
    writer._pool.submit(lambda: None).result(WAIT_SECONDS)
    acts = {"save": lambda: writer.save(state(64), slices(values()))}
    with pytest.raises(StorageDown, match="refused by a drill"):
        acts.get(ask, getattr(writer, ask))()


def test_a_group_that_failed_tries_no_more(run, caplog):
    caplog.set_level(logging.WARNING)
    writer = CheckpointWriter(run, GROUP, 0, 1)
    writer.refuse(10**9)
    writer.save(state(32), slices(values()))
    waiting = Thread(writer.wait)
    writer.give_up()
    assert isinstance(waiting.end(), GroupFailed)


def told_full(error: BaseException | None, run: Location, name: str) -> bool:
    remedy = "free some space and run the same command again; the previous checkpoint is whole"
    return str(error) == f"no space left for {place(run, 64).uri}/{name}: {remedy}"


@pytest.mark.parametrize("name", [STATE, part_file(0, 1), MANIFEST])
def test_a_full_disk_is_told_with_the_remedy_and_leaves_the_previous_checkpoint(run, name):
    previous = save(run, 32)
    partial = local(place(run, 64)) / f".{name}.partial"
    partial.parent.mkdir()
    # Every write to this device fails as on a full disk.
    partial.symlink_to("/dev/full")
    writer = CheckpointWriter(run, GROUP, 0, 1)
    writer.save(state(64), slices(values()))
    error = Thread(writer.wait).end()
    assert isinstance(error, StorageFull)
    assert told_full(error, run, name)
    assert newest_sound(run) == previous
    assert read_state(previous).images == 32


@pytest.mark.parametrize(
    ("function", "error"),
    [
        # What safetensors and the system say, as seen on a full disk.
        ("save", SafetensorError("Error while serializing: I/O error: No space left on device")),
        ("fsync", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_disk_that_fills_up_with_slices_is_told_likewise(run, monkeypatch, function, error):
    def full(*_: object) -> None:
        raise error

    previous = save(run, 32)
    if function == "save":
        monkeypatch.setattr(safetensors.torch, "save_file", full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    writer = CheckpointWriter(run, GROUP, 0, 1)
    writer.save(state(64), slices(values()))
    found = Thread(writer.wait).end()
    assert isinstance(found, StorageFull)
    assert told_full(found, run, slice_file(GENERATOR, 0, 1))
    assert newest_sound(run) == previous


def test_another_failure_of_the_disk_is_not_called_a_full_one(run):
    (run / FOLDER).write(b"a file in the folder's place")
    with pytest.raises(BadInput) as caught:
        save(run, 32)
    assert "no space" not in str(caught.value)
    assert f"{run.uri}/{FOLDER}" in str(caught.value)
