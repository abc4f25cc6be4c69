"""Whatever befalls a save, the newest checkpoint is a whole one, the one before or the new one."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

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
    images_of,
    part_file,
    slice_file,
)
from cat_ray.checkpoint.read import (
    CheckpointReader,
    complete,
    newest,
    newest_sound,
    verify,
)
from cat_ray.checkpoint.retain import drop_old, lease
from cat_ray.checkpoint.write import CheckpointWriter, GroupFailed, Slice
from cat_ray.errors import BadInput, StorageDown
from cat_ray.storage import Location, locate

SCRIPT = Path(__file__).with_name("save_and_die.py")
GROUPS = (GENERATOR, GENERATOR_MOMENTS)
COUNT = 7
WAIT_SECONDS = 60
# In which order workers write. The first one commits: it waits for the others if it isn't the last.
ORDERS = {"one worker": [0], "two, the first last": [1, 0], "two, the first first": [0, 1]}


def writers(run: Location, group: str, workers: int, **options: object) -> list[CheckpointWriter]:
    options = {"retry_seconds": WAIT_SECONDS / 2, **options}
    return [
        CheckpointWriter(run, group, rank, workers, **options)  # pyright: ignore[reportArgumentType]
        for rank in range(workers)
    ]


def begin(group: list[CheckpointWriter], images: int) -> None:
    """Every worker saves its share of numbers that tell the images."""
    workers = len(group)
    for rank, writer in enumerate(group):
        first, beyond = COUNT * rank // workers, COUNT * (rank + 1) // workers
        values = torch.full((beyond - first,), float(images))
        slices = [Slice(kind, "weight", (COUNT,), first, values) for kind in GROUPS]
        writer.save(State(images, 0, "digest", "", {}), slices)


def save(run: Location, images: int, group: str = "3f9a1c", workers: int = 2) -> Location:
    saving = writers(run, group, workers)
    begin(saving, images)
    # The first one last: it waits for the others, and they might have failed.
    waited = [writer.wait() for writer in reversed(saving)]
    return waited[-1][0].location


def place(run: Location, images: int, group: str = "3f9a1c") -> Location:
    return run / FOLDER / folder_name(images, group)


def check(checkpoint: Location | None, images: int) -> None:
    """It is there, no file is damaged, and it holds what was saved after so many images."""
    assert checkpoint is not None
    assert verify(checkpoint) == []
    reader = CheckpointReader(checkpoint)
    assert reader.state.images == images
    for kind in GROUPS:
        assert torch.equal(reader.tensors(kind)["weight"], torch.full((COUNT,), float(images)))


def ended(act: Callable[[], object]) -> BaseException | None:
    """What it raises, in a thread that must not hang."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive(), "it hangs"
    return raised[0] if raised else None


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


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where parts wait for their upload, unless a writer is told another place."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


@pytest.fixture
def remote_run(tmp_path: Path, s3_server) -> Location:
    """A run's folder on the server, of this test's own."""
    return locate(f"s3://{s3_server.bucket}/{tmp_path.name}/run", s3_server.endpoint_url)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doesn't pause for long between a refused write and the next, or for other workers."""
    monkeypatch.setattr(write, "REMOTE_POLL_SECONDS", 0.01)
    for name in ("FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS"):
        monkeypatch.setattr(storage_errors, name, 0.01)


# SIGKILL.


def die(folder: Path, runs: str, act: str, order: list[int], endpoint: str | None = None) -> list:
    """Lets processes die at every moment; the files, in the order in which they come or go."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(folder)}
    if endpoint is not None:
        environment["ENDPOINT"] = endpoint
    script = [sys.executable, str(SCRIPT), str(folder), runs, act, json.dumps(order)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "files.json").read_text())


def check_after_death(run: Location, there: list[str], files: list[str]) -> None:
    """The new checkpoint counts with its last file, which is made where it alone is missing."""
    previous, new = place(run, 32, "000001"), place(run, 64, "000002")
    committed, whole = there == files, there in (files, files[:-1])
    assert newest_sound(run) == newest(run) == (new if committed else previous)
    check(newest_sound(run), 64 if committed else 32)
    check(previous, 32)

    # What the driver does before it starts workers again.
    assert commit_if_whole(previous)
    assert commit_if_whole(new) == whole
    assert newest_sound(run) == newest(run) == (new if whole else previous)
    check(newest_sound(run), 64 if whole else 32)

    # The next worker group saves after as many images again, and goes on.
    check(save(run, 64, "000003", workers=1), 64)
    check(newest_sound(run), 64)
    last = save(run, 96, "000003", workers=1)
    drop_old(run, 1)
    assert [folder.name for folder in (run / FOLDER).folders()] == [last.name]
    check(newest_sound(run), 96)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(order, tmp_path):
    files = die(tmp_path, str(tmp_path), "save", order)
    slices = [slice_file(kind, rank, len(order)) for kind in GROUPS for rank in order]
    parts = [part_file(rank, len(order)) for rank in order]
    assert sorted(files) == sorted([*slices, *parts, STATE, MANIFEST])
    assert files[-1] == MANIFEST
    for at, moment in product(range(len(files)), ("halfway", "before", "after")):
        print(f"killed {moment} {files[at]}")
        there = files[: at + (moment == "after")]
        check_after_death(locate(f"{tmp_path}/{at}-{moment}"), there, files)


def test_a_save_to_object_storage_killed_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path, s3_server, quick
):
    runs = f"s3://{s3_server.bucket}/{tmp_path.name}"
    files = die(tmp_path, runs, "upload", [0], s3_server.endpoint_url)
    assert files == [*(slice_file(kind, 0, 1) for kind in GROUPS), STATE, part_file(0, 1), MANIFEST]
    for at, name in enumerate(files):
        print(f"killed after {name}")
        run = locate(f"{runs}/{at}-after", s3_server.endpoint_url)
        check_after_death(run, files[: at + 1], files)


def test_a_deletion_killed_at_any_moment_leaves_no_half_checkpoint_that_looks_whole(tmp_path):
    files = die(tmp_path, str(tmp_path), "delete", [0])
    assert files.count(MANIFEST) >= 2
    for at, moment in product(range(len(files)), ("before", "after")):
        print(f"killed {moment} {files[at]}")
        run = locate(f"{tmp_path}/{at}-{moment}")
        for _ in range(2):
            check(newest_sound(run), 96)
            for checkpoint in complete(run):
                check(checkpoint, images_of(checkpoint.name))
            # What the driver does before it starts workers again.
            commit_abandoned(run)
        drop_old(run, 1)
        assert [images_of(folder.name) for folder in (run / FOLDER).folders()] == [96]


# Damage.


def truncated(content: bytes) -> bytes:
    return content[:-1]


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    return b""


def flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def first_flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


DAMAGES = (truncated, halved, emptied, flipped, first_flipped)
FILES = (*(slice_file(kind, rank, 2) for kind in GROUPS for rank in (0, 1)), STATE, MANIFEST)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(run, damage, name, caplog):
    previous, last = save(run, 32), save(run, 64)
    (last / name).write(damage((last / name).read()))
    assert newest_sound(run) == previous
    (told,) = verify(last)
    assert f"{last.uri}/{name} is damaged" in told
    assert caplog.messages == [f"{told}; this checkpoint is passed over"]


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_missing_file_is_named_and_the_checkpoint_before_is_used(run, name, caplog):
    previous, last = save(run, 32), save(run, 64)
    (last / name).delete()
    assert newest_sound(run) == previous
    assert verify(last) == [f"{last.uri}/{name} doesn't exist"]
    assert f"{last.uri}/{name} doesn't exist; this checkpoint is passed over" in caplog.text


def test_each_damaged_file_is_named_and_where_all_checkpoints_are_damaged_there_is_none(run):
    checkpoint = save(run, 32)
    for name in FILES[:2]:
        (checkpoint / name).write(flipped((checkpoint / name).read()))
    assert len(verify(checkpoint)) == 2
    assert newest_sound(run) is None


def test_a_save_under_way_is_no_damage_worth_a_warning(run, caplog):
    previous = save(run, 32)
    (save(run, 64) / MANIFEST).delete()
    assert newest_sound(run) == previous
    assert caplog.messages == []


def test_whatever_bit_of_a_manifest_flips_nothing_else_is_read_than_was_written(run):
    previous, last = save(run, 32), save(run, 64)
    content = (last / MANIFEST).read()
    for at in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 7
        (last / MANIFEST).write(bytes(damaged))
        found = newest_sound(run)
        check(found, 32 if found == previous else 64)


# Object storage.


def test_on_object_storage_two_workers_save_check_and_keep_few(remote_run, tmp_path, quick):
    run, places = remote_run, []
    saving = writers(run, "3f9a1c", 2, local_folder=str(tmp_path))
    for images in (32, 64, 96):
        begin(saving, images)
        waited = [writer.wait() for writer in reversed(saving)]
        places.append(waited[-1][0].location)
    assert [folder.path for folder in (run / FOLDER).folders()] == [at.path for at in places]
    for images, checkpoint in zip((32, 64, 96), places, strict=True):
        check(checkpoint, images)

    name = slice_file(GENERATOR, 1, 2)
    (places[2] / name).write(flipped((places[2] / name).read()))
    assert verify(places[2]) == [
        f"{places[2].uri}/{name} is damaged: its sha256 is not the manifest's"
    ]
    assert newest_sound(run) == places[1]

    with lease(places[0]):
        drop_old(run, 1)
        assert list(complete(run)) == [places[2], places[1], places[0]]
        check(places[0], 32)
    # The damaged one takes no place from the newest that is sound.
    drop_old(run, 1)
    assert list(complete(run)) == [places[2], places[1]]
    with pytest.raises(BadInput, match="was deleted while it was being opened"), lease(places[0]):
        raise AssertionError("it was opened")
    # Nothing waits for its upload any longer.
    assert list(tmp_path.iterdir()) == []


def test_workers_of_one_machine_leave_each_others_files_alone(
    remote_run, tmp_path, quick, monkeypatch
):
    # The second one's upload begins when the first one is done with its own, and cleans up.
    upload, cleaned = Location.upload, threading.Event()
    rmtree = write.shutil.rmtree

    def first_then_second(found: Location, source: Path) -> None:
        if ".01-of-02." in found.name:
            assert cleaned.wait(WAIT_SECONDS)
        upload(found, source)

    def removed(*arguments: object, **options: object) -> None:
        rmtree(*arguments, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
        cleaned.set()

    monkeypatch.setattr(Location, "upload", first_then_second)
    monkeypatch.setattr(write.shutil, "rmtree", removed)
    saving = writers(remote_run, "3f9a1c", 2, local_folder=str(tmp_path), retry_seconds=0)
    begin(saving, 32)
    assert ended(saving[1].wait) is None
    check(saving[0].wait()[0].location, 32)


def test_object_storage_that_refuses_for_a_while_delays_a_save(remote_run, quick, caplog):
    saving = writers(remote_run, "3f9a1c", 2)
    for writer in saving:
        writer.refuse(3)
    begin(saving, 32)
    for writer in saving:
        writer.wait()
    check(newest_sound(remote_run), 32)
    assert sum("refused by a drill; retrying" in told for told in caplog.messages) == 2


def test_a_bucket_that_is_not_there_ends_a_save_at_once_with_what_the_server_says(s3_server):
    run = locate("s3://never/run", s3_server.endpoint_url)
    # Were it to wait for this, so would the test.
    (writer,) = writers(run, "3f9a1c", 1, retry_seconds=10 * WAIT_SECONDS)
    begin([writer], 32)
    error = ended(writer.wait)
    assert isinstance(error, BadInput)
    assert str(error).startswith(f"storage failed at {place(run, 32).uri}/")
    assert "NO_SUCH_BUCKET" in str(error)


@pytest.mark.parametrize("refused", [0, 1])
def test_object_storage_that_refuses_for_too_long_leaves_the_previous_checkpoint(
    remote_run, quick, refused
):
    previous = save(remote_run, 32)
    saving = writers(remote_run, "3f9a1c", 2, retry_seconds=0.05)
    saving[refused].refuse(10**9)
    begin(saving, 64)
    error = ended(saving[refused].wait)
    assert isinstance(error, StorageDown)
    assert str(error).startswith(f"storage failed at {place(remote_run, 64).uri}/")
    # The group has failed: the other one isn't left waiting.
    for writer in saving:
        writer.give_up()
    other = ended(saving[1 - refused].wait)
    assert isinstance(other, GroupFailed) if refused == 1 else other is None
    assert newest_sound(remote_run) == previous
    assert not commit_if_whole(place(remote_run, 64))
    check(previous, 32)
