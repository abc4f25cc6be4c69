"""What a run tells of itself is delivered, later if need be; the run never waits for it."""

import threading
import time
from pathlib import Path

import pytest
from pyarrow import fs

from cat_ray.errors import BadInput, StorageDown, StorageFull
from cat_ray.operations import telling as module
from cat_ray.operations.lines import Lines, append, read_lines
from cat_ray.operations.telling import Telling
from cat_ray.storage import Location, locate


@pytest.fixture
def telling(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 0.02)
    made = Telling()
    yield made
    made.close(0)


def remote(folder: Path, name: str) -> Location:
    """A file on a filesystem that isn't this machine's, as an object store is."""
    store = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
    return Location(store, name, f"s3://bucket/{name}")


class Storage:
    """Takes what it is told once it is back."""

    def __init__(self, error: Exception):
        self.taken: list[object] = []
        self.asked = 0
        self.back = threading.Event()
        self._error = error

    def take(self, value: object) -> None:
        self.asked += 1
        if not self.back.is_set():
            raise self._error
        self.taken.append(value)


@pytest.mark.parametrize("error", [StorageDown("away"), StorageFull("full")])
def test_what_is_told_during_an_outage_is_delivered_in_order_once_it_is_over(telling, error):
    storage = Storage(error)
    for number in range(20):
        telling.put(lambda number=number: storage.take(number))
    assert not telling.flush(0.2)
    while storage.asked < 3:
        time.sleep(0.01)
    assert storage.taken == []
    storage.back.set()
    # Nobody waits for a full disk: until the next attempt there is none.
    while not telling.flush(30):
        time.sleep(0.01)
    assert storage.taken == list(range(20))


def test_the_newest_content_of_a_file_replaces_what_still_waits(telling):
    storage = Storage(StorageDown("away"))
    for number in range(20):
        telling.put(lambda number=number: storage.take(number), "file")
    telling.put(lambda: storage.take("other"), "other file")
    storage.back.set()
    assert telling.flush(30)
    assert storage.taken[-2:] == [19, "other"]
    assert len(storage.taken) <= 3


def test_what_may_be_told_seldom_waits_for_its_time_but_not_for_a_checkpoint(telling):
    told: list[int] = []
    telling.put(lambda: told.append(1), "ledger", 3600)
    assert telling.flush(30)
    telling.put(lambda: told.append(2), "ledger", 3600)
    telling.put(lambda: told.append(3), "ledger", 3600)
    time.sleep(0.1)
    assert told == [1]
    assert telling.flush(30)
    assert told == [1, 3]


@pytest.mark.parametrize("error", [BadInput("access denied"), RuntimeError("a tracker's own")])
def test_what_can_never_be_told_is_a_warning_and_nothing_else(telling, caplog, error):
    def fail() -> None:
        raise error

    told: list[int] = []
    telling.put(fail)
    telling.put(lambda: told.append(1))
    assert telling.flush(30)
    assert told == [1]
    assert str(error) in caplog.text


def test_nobody_waits_for_a_full_disk(telling):
    storage = Storage(StorageFull("full"))
    telling.put(lambda: storage.take(1))
    assert not telling.flush(3600)


def test_what_is_not_delivered_at_the_end_is_said(telling, caplog):
    storage = Storage(StorageDown("s3://bucket/run is away"))
    telling.put(lambda: storage.take(1))
    telling.close(0.1)
    assert "s3://bucket/run is away" in caplog.text


# Files of lines.


@pytest.mark.parametrize("place", [lambda p: locate(f"{p}/file"), lambda p: remote(p, "file")])
def test_lines_are_read_as_they_were_written(tmp_path, place):
    lines = Lines(place(tmp_path), kept=b"1\n") if place(tmp_path).local_path is None else None
    if lines is None:
        (tmp_path / "file").write_bytes(b"1\n")
        lines = Lines(place(tmp_path))
    for number in (2, 3):
        lines.append(str(number))
    assert read_lines(place(tmp_path), int) == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"{", b"\x00\x00", b"\xff", b"x" * 10])
def test_a_damaged_line_is_left_out_and_named(tmp_path, caplog, damage):
    place = locate(f"{tmp_path}/file")
    place.write(b"1\n" + damage + b"\n3\n")
    assert read_lines(place, int) == [1, 3]
    assert f"{place.uri}: line 2 is damaged" in caplog.text


def test_a_last_line_that_is_still_being_written_is_no_damage(tmp_path, caplog):
    place = locate(f"{tmp_path}/file")
    place.write(b"1\n2\n{")
    assert read_lines(place, int) == [1, 2]
    assert caplog.text == ""


def test_a_line_that_finds_no_space_leaves_the_file_as_it_was(tmp_path: Path):
    (tmp_path / "file").symlink_to("/dev/full")
    with pytest.raises(StorageFull, match="no space left"):
        append(tmp_path / "file", b"more\n")


def test_lines_are_all_there_after_an_outage(telling, tmp_path, monkeypatch):
    place, down = remote(tmp_path, "file"), threading.Event()
    write = Location.write

    def away(self: Location, content: bytes) -> None:
        if down.is_set():
            raise StorageDown("away")
        write(self, content)

    monkeypatch.setattr(Location, "write", away)
    lines = Lines(place, telling.put)
    for number in range(300):
        if number == 100:
            down.set()
        if number == 200:
            down.clear()
        lines.append(str(number))
    assert telling.flush(30)
    assert read_lines(place, int) == list(range(300))
