"""A disk that fills up ends a save, and costs neither a checkpoint nor the space of half a one."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from cat_ray.checkpoint.layout import (
    DISCRIMINATOR,
    FOLDER,
    GENERATOR,
    MANIFEST,
    STATE,
    State,
    folder_name,
    part_file,
)
from cat_ray.checkpoint.read import newest, newest_sound, read_tensors
from cat_ray.checkpoint.write import CheckpointWriter, Slice
from cat_ray.errors import BadInput, ExpectedError, StorageFull
from cat_ray.storage import Location, locate

GROUP = "3f9a1c"
COUNT = 20_000
# Three checkpoints of two groups take 130 pages.
PAGE, DISK_PAGES = 4096, 160
PREVIOUS = "; the previous checkpoint is whole"
REMEDY = "free some space and run the same command again"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of this test's own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_PAGES * PAGE}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def values(seed: int) -> torch.Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))


def save(run: Location, images: int, **options: object) -> BaseException | None:
    """One worker saves two groups; what that raises."""
    writer = CheckpointWriter(run, GROUP, 0, 1, retry_seconds=0, **options)  # pyright: ignore
    groups = (GENERATOR, DISCRIMINATOR)
    slices = [Slice(group, "weight", (COUNT,), 0, values(images)) for group in groups]
    writer.save(State(images, 0, "digest", "", {}), slices)
    try:
        writer.wait()
    except ExpectedError as error:
        return error
    finally:
        writer.give_up()
    return None


def fill(disk: Path, pages: int) -> Path:
    """Leaves so many pages free."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(b"\0" * (shutil.disk_usage(disk).free - pages * PAGE))
    return filler


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def check_holds(checkpoint: Location | None, images: int) -> None:
    assert checkpoint is not None
    assert torch.equal(read_tensors(checkpoint, GENERATOR)["weight"], values(images))


@pytest.mark.parametrize("pages", [0, 1, 10, 20, 21, 30, 41, 42, 43])
@pytest.mark.parametrize("previous", [True, False])
def test_a_disk_that_is_full_at_any_moment_leaves_what_was_there_and_nothing_torn(
    disk, pages, previous
):
    run = locate(str(disk / "run"))
    if previous:
        assert save(run, 32) is None
    before = files(disk)
    filler = fill(disk, pages)
    error = save(run, 64)
    if error is not None:
        assert type(error) is StorageFull and error.exit_code == 75
        place = (run / FOLDER / folder_name(64, GROUP)).uri
        assert str(error).startswith(f"no space left for {place}")
        assert str(error).endswith(f": {REMEDY}{PREVIOUS if previous else ''}")
        assert newest_sound(run) == (run / FOLDER / folder_name(32, GROUP) if previous else None)
        # Else whoever tries again finds less and less space. A whole part waits for its manifest.
        left = files(disk) - before - {"filler"}
        assert part_file(0, 1) in left or not left
        assert not any(name.startswith(".") for name in left)
    filler.unlink()
    assert save(run, 96) is None
    check_holds(newest_sound(run), 96)


def test_the_sizes_above_fill_the_disk_at_the_first_slices_and_at_the_last_file(disk):
    run = locate(str(disk / "run"))
    assert save(run, 32) is None
    filler = fill(disk, 21)
    told = str(save(run, 64))
    assert f"{DISCRIMINATOR}.00-of-01" in told
    filler.unlink()
    used = sum(-(-path.stat().st_size // PAGE) for path in (disk / "run").rglob("*"))
    assert 40 <= used <= 50


@pytest.mark.parametrize("name", [STATE, part_file(0, 1), MANIFEST])
@pytest.mark.parametrize("previous", [True, False])
def test_the_previous_checkpoint_is_only_called_whole_where_there_is_one(tmp_path, name, previous):
    run = locate(str(tmp_path / "run"))
    if previous:
        save(run, 32)
    folder = tmp_path / "run" / FOLDER / folder_name(64, GROUP)
    folder.mkdir(parents=True)
    # Every write to this device fails as on a full disk.
    (folder / f".{name}.partial").symlink_to("/dev/full")
    error = save(run, 64)
    assert isinstance(error, StorageFull)
    assert str(error) == (
        f"no space left for {folder}/{name}: {REMEDY}{PREVIOUS if previous else ''}"
    )
    assert not any(path.name.startswith(".") for path in folder.iterdir())


def test_a_full_local_disk_on_the_way_to_object_storage_is_told_and_emptied(disk, tmp_path):
    # Arrow writes to this as to an object store, which needs no folders.
    for images in (32, 64, 96):
        (tmp_path / "bucket/run" / FOLDER / folder_name(images, GROUP)).mkdir(parents=True)
    store = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
    run = Location(store, "run", "s3://bucket/run")
    assert run.local_path is None
    local = disk / "staging"
    assert save(run, 32, local_folder=str(local)) is None
    filler = fill(disk, 30)
    error = save(run, 64, local_folder=str(local))
    assert isinstance(error, StorageFull)
    assert str(error).startswith(f"no space left for {local}/")
    assert str(error).endswith(f": {REMEDY}{PREVIOUS}")
    assert files(disk) == {"filler"}
    found = newest(run)
    assert found is not None and found.name == folder_name(32, GROUP)
    filler.unlink()
    assert save(run, 96, local_folder=str(local)) is None
    assert files(disk) == set()


@pytest.mark.parametrize("ask", ["save", "settle", "finished", "wait"])
def test_a_full_disk_is_told_by_whatever_training_calls_next(disk, ask):
    run = locate(str(disk / "run"))
    fill(disk, 10)
    writer = CheckpointWriter(run, GROUP, 0, 1)
    slices = [Slice(GENERATOR, "weight", (COUNT,), 0, values(0))]
    writer.save(State(32, 0, "digest", "", {}), slices)
    # Its thread is one: with the next task done, so is the save.
    writer._pool.submit(lambda: None).result(60)
    acts = {"save": lambda: writer.save(State(64, 0, "digest", "", {}), slices)}
    with pytest.raises(StorageFull, match="no space left for"):
        acts.get(ask, getattr(writer, ask))()


def test_storage_that_refuses_for_good_is_not_asked_again(tmp_path, monkeypatch):
    run, asked = locate(str(tmp_path / "run")), []

    def refused(place: Location, content: bytes) -> None:
        asked.append(place)
        raise BadInput(f"storage failed at {place.uri}: HTTP 403 Forbidden")

    monkeypatch.setattr(Location, "write", refused)
    writer = CheckpointWriter(run, GROUP, 0, 1, retry_seconds=10_000)
    slices = [Slice(GENERATOR, "weight", (COUNT,), 0, values(0))]
    writer.save(State(32, 0, "digest", "", {}), slices)
    with pytest.raises(BadInput, match="HTTP 403"):
        writer.wait()
    assert len(asked) == 1


def test_the_patience_of_a_save_is_its_own_and_not_the_runs_on_top(tmp_path, monkeypatch):
    patience: list[float] = []
    plain = Location.write

    def noted(place: Location, content: bytes) -> None:
        patience.append(place.retry_seconds)
        plain(place, content)

    monkeypatch.setattr(Location, "write", noted)
    assert save(locate(str(tmp_path / "run"), retry_seconds=300), 32) is None
    assert set(patience) == {0}
