"""Few checkpoints are kept, and always the ones that a run may have to go on from."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.checkpoint.layout import (
    FOLDER,
    GENERATOR,
    MANIFEST,
    State,
    folder_name,
    images_of,
    slice_file,
)
from cat_ray.checkpoint.read import newest, newest_sound, verify
from cat_ray.checkpoint.retain import BEST, drop_old, kept, write_best
from cat_ray.checkpoint.write import CheckpointWriter, Slice
from cat_ray.errors import BadInput
from cat_ray.storage import Location, locate

GROUP = "3f9a1c"
few = settings(max_examples=100, deadline=None, derandomize=True)


def save(run: Location, images: int, group: str = GROUP) -> Location:
    writer = CheckpointWriter(run, group, 0, 1)
    slices = [Slice(GENERATOR, "weight", (7,), 0, torch.full((7,), float(images)))]
    writer.save(State(images, 0, "digest", "", {}), slices)
    return writer.wait()[0].location


def place(run: Location, images: int) -> Location:
    return run / FOLDER / folder_name(images, GROUP)


def left(run: Location) -> list[int]:
    """The numbers of images of all folders, whole or not."""
    return [images_of(folder.name) for folder in (run / FOLDER).folders()]


def local(found: Location) -> Path:
    assert found.local_path is not None
    return found.local_path


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


# Keeping few.


@pytest.mark.parametrize(
    ("keep", "staying"), [(1, [96]), (2, [64, 96]), (3, [32, 64, 96]), (9, [32, 64, 96])]
)
def test_the_newest_checkpoints_are_kept(run, keep, staying):
    for images in (32, 64, 96):
        save(run, images)
    drop_old(run, keep)
    assert left(run) == staying
    assert all(verify(folder) == [] for folder in (run / FOLDER).folders())


def test_milestones_are_kept_beside_the_newest(run):
    for images in (32, 64, 96, 128, 160, 192, 224):
        save(run, images)
        drop_old(run, 1, every_images=100)
    assert left(run) == [128, 224]
    for images in (256, 288, 320):
        save(run, images)
        drop_old(run, 1, every_images=100)
    assert left(run) == [128, 224, 320]


def test_the_best_stay_as_long_as_they_are_the_best(run):
    for images in (32, 64, 96):
        save(run, images)
    write_best(run, [place(run, 32).name])
    drop_old(run, 1)
    assert left(run) == [32, 96]
    write_best(run, [place(run, 96).name])
    save(run, 128)
    drop_old(run, 1)
    assert left(run) == [96, 128]


@few
@given(
    st.sets(st.integers(1, 400), min_size=1).map(sorted),
    st.integers(1, 5),
    st.integers(1, 100) | st.none(),
)
def test_what_is_kept_is_the_newest_few_and_the_first_past_each_multiple(images, keep, every):
    expected = set(images[-keep:])
    if every is not None:
        for multiple in range(every, 401, every):
            past = [count for count in images if multiple <= count < multiple + every]
            expected.update(past[:1])
    assert kept(images, keep, every) == expected


@few
@given(
    st.sets(st.integers(1, 400), min_size=1).map(sorted),
    st.integers(1, 5),
    st.integers(1, 100) | st.none(),
)
def test_deleting_after_every_save_keeps_what_deleting_at_the_end_does(images, keep, every):
    there: list[int] = []
    for count in images:
        there = sorted(kept([*there, count], keep, every))
    assert set(there) == kept(images, keep, every)


def test_an_unfinished_checkpoint_neither_counts_nor_goes_before_a_newer_one_is_there(run):
    for images in (32, 64, 96, 128):
        save(run, images)
    (place(run, 128) / MANIFEST).delete()
    drop_old(run, 2)
    assert left(run) == [64, 96, 128]
    save(run, 160)
    drop_old(run, 2)
    assert left(run) == [96, 160]


def test_two_groups_after_as_many_images_count_as_one(run):
    # One may be damaged: what the other came from stays.
    for images, group in ((32, GROUP), (64, GROUP), (96, GROUP), (96, "000000")):
        save(run, images, group)
    drop_old(run, 2)
    assert left(run) == [64, 96, 96]


def test_where_there_is_nothing_nothing_is_dropped(run):
    drop_old(run, 1)
    assert newest(run) is None


def test_a_damaged_checkpoint_ahead_drives_out_none_of_those_that_the_run_goes_on_from(run):
    # Its sizes are right, so that only hashing tells: the run went on from the one before.
    save(run, 64)
    path = local(save(run, 128)) / slice_file(GENERATOR, 0, 1)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    unfinished = save(run, 112)
    (unfinished / MANIFEST).delete()
    saved = save(run, 96)
    drop_old(run, 1, committed=saved)
    assert newest_sound(run) == saved
    # Another worker may be faster, and have saved its part of the next one.
    assert left(run) == [96, 112, 128]


def test_a_damaged_checkpoint_that_the_run_has_passed_takes_no_place_and_goes(run):
    for images in (32, 64):
        save(run, images)
    path = local(place(run, 64) / slice_file(GENERATOR, 0, 1))
    path.write_bytes(path.read_bytes()[:-1])
    assert newest_sound(run) == place(run, 32)
    committed = save(run, 96)
    drop_old(run, keep=2, committed=committed)
    assert left(run) == [32, 96]


def test_storage_that_fails_while_old_ones_are_deleted_fails_no_save(run, monkeypatch, caplog):
    for images in (32, 64):
        save(run, images)
    with monkeypatch.context() as patched:

        def refused(found: Location) -> None:
            raise BadInput(f"storage failed at {found.uri}")

        patched.setattr(Location, "delete", refused)
        drop_old(run, 1)
        assert any("storage failed at" in message for message in caplog.messages)
    assert left(run) == [32, 64]
    drop_old(run, 1)
    assert left(run) == [64]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_where_no_file_can_tell_which_are_the_best_none_is_deleted(run, make, caplog):
    for images in (32, 64, 96):
        save(run, images)
    make(Path((run / BEST).path))
    drop_old(run, 1)
    assert left(run) == [32, 64, 96]
    assert "best.json is no file: remove what lies there" in caplog.text
