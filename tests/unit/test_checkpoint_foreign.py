"""What isn't a run's own is never read and never deleted, whatever lies beside its checkpoints."""

import json
import os
import stat
import string
import time
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from cat_ray.checkpoint import retain
from cat_ray.checkpoint.commit import commit_abandoned
from cat_ray.checkpoint.layout import (
    DAMAGED,
    FOLDER,
    GENERATOR,
    MANIFEST,
    STATE,
    State,
    average_group,
    checkpoint_folders,
    folder_name,
    images_of,
    is_own_file,
    part_file,
    slice_file,
)
from cat_ray.checkpoint.read import any_committed, complete, newest, newest_sound, resolve, verify
from cat_ray.checkpoint.retain import (
    BEST,
    LEASE_SECONDS,
    LONGEST_LEASE_SECONDS,
    drop_old,
    lease,
    leased,
    read_best,
    write_best,
)
from cat_ray.checkpoint.write import CheckpointWriter, Slice
from cat_ray.errors import Damaged, StorageDown, StorageFull
from cat_ray.storage import Location, locate

GROUP = "3f9a1c"


def save(run: Location, images: int, group: str = GROUP) -> Location:
    writer = CheckpointWriter(run, group, 0, 1)
    slices = [Slice(GENERATOR, "weight", (7,), 0, torch.full((7,), float(images)))]
    writer.save(State(images, 0, "digest", "", {}), slices)
    saved = writer.wait()[0].location
    writer.give_up()
    return saved


def place(run: Location, images: int, group: str = GROUP) -> Location:
    return run / FOLDER / folder_name(images, group)


def left(run: Location) -> list[int]:
    return [images_of(folder.name) for folder in checkpoint_folders(run)]


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def local(found: Location) -> Path:
    assert found.local_path is not None
    return found.local_path


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


# Folders.


FOREIGN_FOLDERS = [
    "eval-500",
    "backup",
    "lost+found",
    ".ipynb_checkpoints",
    ".snapshot",
    "images",
    "images-",
    "images-500",
    "images-500-3f9a1c",
    "images-000000000500",
    "images-000000000500-3f9a1c-mybackup",
    "images-000000000500-3f9a1c.bak",
    "images-000000000500-3f9a1c (copy)",
    "images-000000000500-3f9a1c-staying-2",
    "images-000000000500-3F9A1C",
    "images-000000000500-3f9a1",
    "images-0000000000500-3f9a1c",
    "images-00000000050x-3f9a1c",
    "images-" + "\u0660" * 12 + "-3f9a1c",
    "images-000000000500-3f9a1c\n",
    "Images-000000000500-3f9a1c",
    "old images-000000000500-3f9a1c",
]


def check_untouched(run: Location, name: str) -> None:
    """Around two checkpoints and a copy of one under this name, all work, and it stays."""
    for images in (700, 800):
        save(run, images)
    stray = local(run / FOLDER) / name
    stray.mkdir()
    (stray / "mine.txt").write_text("mine")
    for file, held in content(local(place(run, 700))).items():
        (stray / file).write_bytes(held)
    before = content(stray)
    commit_abandoned(run)
    assert newest_sound(run) == newest(run) == resolve(run) == place(run, 800)
    assert list(complete(run)) == [place(run, 800), place(run, 700)]
    drop_old(run, 1)
    assert left(run) == [800]
    assert content(stray) == before
    (place(run, 800) / MANIFEST).delete()
    assert not any_committed(run)


@pytest.mark.parametrize("name", FOREIGN_FOLDERS)
def test_a_folder_of_another_name_is_neither_read_nor_deleted(run, name):
    check_untouched(run, name)


MUTATED = st.builds(
    lambda at, cut, put: folder_name(500, GROUP)[:at] + put + folder_name(500, GROUP)[at + cut :],
    st.integers(0, 26),
    st.integers(0, 3),
    st.text(string.printable.replace("/", ""), max_size=3),
)


@settings(max_examples=50, deadline=None)
@given(MUTATED)
@example("images-000000000500-3f9a1c-stayin")
@example(".images-000000000500-3f9a1c.partial")
def test_no_other_name_than_the_exact_one_is_ever_a_checkpoints(tmp_path_factory, name):
    # Written out here once more: what the form is, without the form.
    begin, middle, end = name[:7], name[7:19], name[19:].removesuffix("-staying")
    hexadecimal = set("0123456789abcdef")
    exact = begin == "images-" and len(middle) == 12 and set(middle) <= set(string.digits)
    assume(not (exact and len(end) == 7 and end[0] == "-" and set(end[1:]) <= hexadecimal))
    assume(name not in ("", ".", ".."))
    check_untouched(locate(str(tmp_path_factory.mktemp("run"))), name)


def test_files_beside_the_checkpoints_are_left_alone(run):
    for images in (32, 64):
        save(run, images)
    (run / FOLDER / "notes.txt").write(b"mine")
    (run / FOLDER / folder_name(16, GROUP)).write(b"a file of a checkpoint's name")
    assert newest_sound(run) == place(run, 64)
    drop_old(run, 1)
    assert sorted((run / FOLDER).sizes()) == [folder_name(16, GROUP), "notes.txt"]


def test_checkpoints_of_leaving_workers_and_of_very_many_images_are_a_runs_own(run):
    names = [(10**12 - 1, GROUP), (10**12, "000000"), (10**12, "000000-staying"), (10**13, GROUP)]
    for images, group in names:
        save(run, images, group)
    assert [found.name for found in checkpoint_folders(run)] == [
        folder_name(images, group) for images, group in names
    ]
    assert newest_sound(run) == place(run, 10**13)
    drop_old(run, 1)
    assert left(run) == [10**13]


# Files within a checkpoint's folder.


@pytest.mark.parametrize(
    "name",
    ["notes.txt", ".DS_Store", "generator.safetensors", "manifest.json.bak", "lease-mine.json"],
)
def test_a_checkpoint_with_somebodys_file_in_it_stays_whole_and_is_told(run, name, caplog):
    for images in (32, 64):
        save(run, images)
    (place(run, 32) / name).write(b"mine")
    before = content(local(place(run, 32)))
    drop_old(run, 1)
    assert content(local(place(run, 32))) == before
    assert verify(place(run, 32)) == []
    (told,) = caplog.messages
    assert told.startswith(f"{place(run, 32).uri} is kept, for it holds {name}, which")
    (place(run, 32) / name).delete()
    drop_old(run, 1)
    assert left(run) == [64]


def test_a_checkpoint_with_a_folder_in_it_stays_whole_even_if_the_folder_is_empty(run, caplog):
    for images in (32, 64):
        save(run, images)
    local(place(run, 32) / "samples").mkdir()
    drop_old(run, 1)
    assert verify(place(run, 32)) == []
    assert "holds samples, which" in caplog.text


def test_all_that_a_run_itself_leaves_in_a_folder_goes_with_it(run):
    for images in (32, 64):
        save(run, images)
    names = [
        *(f".{name}.partial" for name in (STATE, MANIFEST, part_file(3, 12), DAMAGED)),
        f".{slice_file(average_group(1e-05), 111, 256)}.partial",
        slice_file(average_group(0.999), 7, 8),
        part_file(0, 1000),
        DAMAGED,
        ".tmpa8Ux01",
    ]
    for name in names:
        assert is_own_file(name)
        (place(run, 32) / name).write(b"")
    drop_old(run, 1)
    assert [found.name for found in (run / FOLDER).folders()] == [folder_name(64, GROUP)]


# Leases.


LEASES = [
    b"",
    b"{",
    b'{"until": 17',
    b"null",
    b"[]",
    b"{}",
    b'{"until": "tomorrow"}',
    b'{"until": true}',
    b'{"until": null}',
    b'{"until": NaN}',
    b'{"until": Infinity}',
    b'{"until": 1e999}',
    b'{"until": 1e15}',
    b'{"until": ' + b"9" * 5000 + b"}",
    b'{"until": [' + b"[" * 100_000,
    b"\xff\xfe\x00\x01",
    b"\x00" * 4096,
]


@pytest.mark.parametrize("written", LEASES, ids=lambda written: repr(written[:24]))
def test_a_lease_that_says_nothing_of_use_holds_for_as_long_as_a_lease_is(run, written):
    for images in (32, 64):
        save(run, images)
    lease_of = place(run, 32) / "lease-0123abcd.json"
    lease_of.write(written)
    drop_old(run, 1)
    assert left(run) == [32, 64], "somebody may be reading"
    old = time.time() - LEASE_SECONDS - 1
    os.utime(local(lease_of), (old, old))
    drop_old(run, 1)
    assert left(run) == [64], "nobody is"


def test_no_lease_of_ours_is_taken_for_one_that_is_too_long(run):
    held = save(run, 32)
    with lease(held, LONGEST_LEASE_SECONDS - 60):
        (name,) = (name for name in held.sizes() if name.startswith("lease-"))
        old = time.time() - 2 * LEASE_SECONDS
        os.utime(local(held / name), (old, old))
        assert leased(held)


@pytest.mark.parametrize("error", [StorageDown("down"), StorageFull("full")])
def test_where_storage_takes_no_lease_reading_goes_on_with_a_warning(
    run, monkeypatch, caplog, error
):
    held = save(run, 32)

    def refused(found: Location, content: bytes) -> None:
        raise error

    monkeypatch.setattr(Location, "write", refused)
    with lease(held):
        assert verify(held) == []
    assert "a training run may delete what is being read" in caplog.text


def test_a_lease_that_cannot_be_taken_back_runs_out_by_itself(run, monkeypatch, caplog):
    held = save(run, 32)

    def refused(found: Location) -> None:
        raise StorageDown("down")

    monkeypatch.setattr(Location, "delete", refused)
    with lease(held, seconds=1000):
        pass
    assert caplog.messages == ["a lease stays until it runs out: down"]
    now = time.time()
    monkeypatch.setattr(retain.time, "time", lambda: now + 1001)
    assert not leased(held)


@pytest.mark.parametrize("error", [StorageDown("down"), StorageFull("full")])
def test_storage_that_is_down_or_full_while_old_ones_are_deleted_fails_no_save(
    run, monkeypatch, caplog, error
):
    for images in (32, 64):
        save(run, images)

    def refused(found: Location) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Location, "delete", refused)
        drop_old(run, 1)
    assert caplog.messages == [f"{error}; old checkpoints are deleted after the next save"]
    drop_old(run, 1)
    assert left(run) == [64]


# The best.


BESTS = [
    b"",
    b"[",
    b'["images-000000000032-3f9a1c"',
    b"null",
    b"{}",
    b"7",
    b'"images-000000000032-3f9a1c"',
    b"[7]",
    b"[null]",
    b'[["images-000000000032-3f9a1c"]]',
    b'["../../data"]',
    b'["images-000000000032-3f9a1c", "my-favourite"]',
    b'{"best": ["images-000000000032-3f9a1c"]}',
    b"\xff\xfe",
    b"[" * 100_000,
]


@pytest.mark.parametrize("written", BESTS, ids=lambda written: repr(written[:32]))
def test_where_it_cannot_be_known_which_are_the_best_none_is_deleted(run, written, caplog):
    for images in (32, 64, 96):
        save(run, images)
    (run / BEST).write(written)
    with pytest.raises(Damaged, match=f"{BEST} is damaged"):
        read_best(run)
    drop_old(run, 1)
    assert left(run) == [32, 64, 96]
    (told,) = caplog.messages
    assert told.startswith(f"{(run / BEST).uri} is damaged: ")
    assert told.endswith("; until it is restored or removed, no checkpoint is deleted")
    write_best(run, [place(run, 32).name])
    drop_old(run, 1)
    assert left(run) == [32, 96]


def test_a_run_without_measurements_has_no_best(run):
    assert read_best(run) == []
    write_best(run, [folder_name(32, GROUP)])
    assert json.loads((run / BEST).read()) == read_best(run) == [folder_name(32, GROUP)]


@pytest.mark.parametrize("kind", ["link", "pipe", "socket"])
def test_a_checkpoint_with_what_is_no_file_in_it_stays_whole_and_is_told(run, kind, caplog):
    first = save(run, 32)
    save(run, 64)
    path = local(first) / "notes"
    if kind == "link":
        path.symlink_to("/mnt/unmounted/notes")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.mknod(path, stat.S_IFSOCK)
    before = sorted(each.name for each in local(first).iterdir())
    drop_old(run, 1)
    assert sorted(each.name for each in local(first).iterdir()) == before
    assert "holds notes, which is not cat-ray's" in caplog.text


def test_a_checkpoint_that_is_a_link_keeps_what_it_leads_to(run, tmp_path, caplog):
    first = save(run, 32)
    save(run, 64)
    other = tmp_path / "another run's"
    local(first).rename(other)
    local(first).symlink_to(other)
    before = content(other)
    drop_old(run, 1)
    assert content(other) == before and local(first).is_symlink()
    assert "is kept, for it is a link" in caplog.text
