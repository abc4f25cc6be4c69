"""Local folders and object stores behind one type, and errors that say what to do."""

import errno
import os
import threading
from pathlib import Path
from typing import IO

import pytest
from pyarrow import NativeFile

from cat_ray import storage, storage_errors
from cat_ray.errors import BadInput, StorageDown, StorageFull
from cat_ray.storage import Location, locate


@pytest.fixture
def place(tmp_path: Path) -> Location:
    return locate(str(tmp_path))


def files(folder: Path) -> dict[str, bytes]:
    """What a reader finds under names that are not hidden."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


# Where things are.


def test_paths_of_every_form_lead_to_the_same_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for uri in (f"{tmp_path}/a/b", f"file://{tmp_path}/a/b", "a/b", "~/a/b", "./a/b/"):
        found = locate(uri)
        assert (found.path, found.uri) == (f"{tmp_path}/a/b",) * 2
        assert found.local_path == tmp_path / "a" / "b"
        assert found.name == "b"


def test_a_path_below_a_place_is_joined_with_one_slash(place, tmp_path):
    below = place / "a" / "b.txt"
    assert (below.path, below.uri) == (f"{tmp_path}/a/b.txt",) * 2
    assert below.name == "b.txt"


@pytest.mark.parametrize("name", ["a b", "50%", "q?x=1#y", "ü"])
def test_odd_characters_in_a_local_name_are_only_characters(place, tmp_path, name):
    folder = locate(f"{tmp_path}/{name}")
    (folder / "file").write(b"x")
    assert (tmp_path / name / "file").read_bytes() == b"x"
    assert (folder / "file").read() == b"x"


@pytest.mark.parametrize("uri", ["http://host/key", "hdfs://x/y", "s4://b/k"])
def test_a_scheme_that_is_not_supported_is_refused(uri):
    with pytest.raises(BadInput, match=f"{uri}: use a local path, s3://bucket/key"):
        locate(uri)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "minio", "localhost:9000", "ftp://minio"])
def test_an_endpoint_that_is_no_http_address_is_refused(endpoint):
    with pytest.raises(BadInput, match=r"storage\.endpoint_url .*begin it with http://"):
        locate("s3://bucket/key", endpoint)


# Files and folders.


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 5000])
def test_what_is_written_is_read(place, tmp_path, content):
    file = place / "deep" / "er" / "file"
    assert not file.exists()
    file.write(content)
    assert file.read() == content
    assert (tmp_path / "deep" / "er" / "file").read_bytes() == content
    assert (file.exists(), file.size()) == (True, len(content))


def test_what_is_uploaded_is_read(place, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"new" * 1000)
    for _ in range(2):
        (place / "deep" / "file").upload(source)
        assert (place / "deep" / "file").read() == b"new" * 1000
    assert source.read_bytes() == b"new" * 1000


def test_a_later_write_replaces_the_whole_file(place):
    (place / "file").write(b"long content")
    (place / "file").write(b"short")
    assert (place / "file").read() == b"short"


def test_a_file_written_in_pieces_is_in_place_once_it_is_whole(place, tmp_path):
    (place / "folder" / "file").write(b"old")
    with (place / "folder" / "file").written() as file:
        file.write(b"new ")
        assert files(tmp_path / "folder") == {"file": b"old"}
        file.write(b"content")
    assert files(tmp_path / "folder") == {"file": b"new content"}
    with pytest.raises(ZeroDivisionError), (place / "folder" / "file").written() as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert files(tmp_path / "folder") == {"file": b"new content"}


def test_folders_come_by_name_and_without_files_or_grandchildren(place):
    for name in ("b/1", "a/1", "a/c/1", "10/1", "9/1", "file"):
        (place / name).write(b"x")
    assert [folder.name for folder in place.folders()] == ["10", "9", "a", "b"]
    assert (place.folders()[2] / "1").read() == b"x"


def test_sizes_are_those_of_the_files_directly_below(place):
    for name, size in (("a", 3), ("b", 0), ("folder/c", 7)):
        (place / name).write(b"x" * size)
    assert place.sizes() == {"a": 3, "b": 0}


def test_nothing_is_found_where_there_is_nothing(place):
    absent = place / "absent"
    assert (absent.exists(), absent.size()) == (False, None)
    assert (absent.folders(), absent.sizes()) == ([], {})


def test_a_folder_may_come_into_being_while_it_is_looked_at(place, tmp_path):
    coming = [tmp_path / str(number) for number in range(3000)]
    maker = threading.Thread(target=lambda: [folder.mkdir() for folder in coming])
    maker.start()
    for folder in coming:
        while not folder.exists():
            assert (place / folder.name).sizes() == {}
    maker.join()


def test_a_folder_is_no_file(place):
    (place / "folder" / "file").write(b"x")
    assert not (place / "folder").exists()
    assert (place / "folder").size() is None


def test_a_deleted_file_is_gone_and_one_that_is_not_there_is_no_error(place, tmp_path):
    for name in ("gone", "kept", "folder/kept"):
        (place / name).write(b"x")
    for name in ("gone", "gone", "absent", "folder"):
        (place / name).delete()
    assert files(tmp_path / "folder").keys() == {"kept"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "kept"]


def test_a_deleted_folder_is_gone_with_all_below_and_nothing_beside(place, tmp_path):
    for name in ("gone/a", "gone/deep/b", "kept/c"):
        (place / name).write(b"x")
    (place / "gone").delete_folder()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (place / "kept" / "c").exists()


@pytest.mark.parametrize(("begin", "end"), [(0, 0), (0, 5), (3, 7), (9, 10), (0, 10)])
def test_a_range_is_those_bytes_of_the_file(place, begin, end):
    (place / "file").write(b"0123456789")
    assert (place / "file").read_range(begin, end) == b"0123456789"[begin:end]


@pytest.mark.parametrize(("begin", "end"), [(5, 11), (10, 12), (20, 30)])
def test_a_range_past_the_files_end_is_refused_by_name(place, begin, end):
    (place / "file").write(b"0123456789")
    with pytest.raises(BadInput, match=rf"file ends at byte \d+, before {end}"):
        (place / "file").read_range(begin, end)


def test_a_range_of_a_file_that_is_not_there_is_refused_by_name(place):
    with pytest.raises(BadInput, match="absent doesn't exist"):
        (place / "absent").read_range(0, 1)


def test_an_opened_file_can_be_sought_in(place):
    (place / "file").write(b"0123456789")
    with (place / "file").opened() as file:
        file.seek(4)
        assert file.read(3) == b"456"
    with pytest.raises(BadInput, match="absent doesn't exist"), (place / "absent").opened():
        pass


def test_files_below_come_by_their_path_from_here_at_any_depth(place):
    for name, size in (("a", 3), ("b/c", 0), ("b/d/e.png", 7)):
        (place / name).write(b"x" * size)
    assert place.files_below() == {"a": 3, "b/c": 0, "b/d/e.png": 7}
    assert (place / "b").files_below() == {"c": 0, "d/e.png": 7}
    assert (place / "absent").files_below() == {}


def test_places_can_be_told_apart_and_found_again(place):
    assert len({place / "a", place / "a", place / "b"}) == 2


# Failures.


@pytest.mark.parametrize("name", ["absent", "absent/file"])
def test_a_file_that_is_not_there_is_named(place, name):
    with pytest.raises(BadInput) as caught:
        (place / name).read()
    assert str(caught.value) == f"{place.uri}/{name} doesn't exist"


def test_a_file_in_a_folders_place_is_told_by_name(place):
    (place / "file").write(b"x")
    for act in (
        lambda: (place / "file").folders(),
        lambda: (place / "file" / "below").write(b"y"),
    ):
        with pytest.raises(BadInput, match=f"{place.uri}/file.*: what should be a folder is"):
            act()


@pytest.mark.parametrize("before", [None, b"old content"])
def test_a_write_that_fails_leaves_what_was_there(place, tmp_path, before):
    if before is not None:
        (place / "file").write(before)
    # Every write to this device fails as on a full disk.
    (tmp_path / ".file.partial").symlink_to("/dev/full")
    with pytest.raises(StorageFull, match=r"no space left for .*/file: free some") as caught:
        (place / "file").write(b"new content")
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ENOSPC
    assert files(tmp_path) == ({} if before is None else {"file": before})


@pytest.mark.parametrize("before", [None, b"old content"])
def test_a_write_that_is_killed_leaves_what_was_there(place, tmp_path, monkeypatch, before):
    if before is not None:
        (place / "file").write(before)

    def killed_halfway(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", killed_halfway)
    with pytest.raises(KeyboardInterrupt):
        (place / "file").write(b"new content")
    assert files(tmp_path) == ({} if before is None else {"file": before})


@pytest.mark.parametrize("before", [None, b"old content"])
def test_an_upload_that_fails_leaves_what_was_there(place, tmp_path, monkeypatch, before):
    source = tmp_path.parent / f"{tmp_path.name}-source"
    source.write_bytes(b"new content")
    if before is not None:
        (place / "file").write(before)

    def breaks_off(content: IO[bytes], file: NativeFile, _: int) -> None:
        file.write(content.read(3))
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage.shutil, "copyfileobj", breaks_off)
    with pytest.raises(StorageDown, match=r"storage failed at .*/file"):
        (place / "file").upload(source)
    assert files(tmp_path) == ({} if before is None else {"file": before})


def test_a_source_that_is_not_there_is_bad_input(place, tmp_path):
    with pytest.raises(BadInput):
        (place / "file").upload(tmp_path / "absent")
    assert not (place / "file").exists()


def test_a_local_failure_gives_no_advice_on_credentials(place):
    (place / "file").write(b"x")
    with pytest.raises(BadInput) as caught:
        (place / "file" / "below").write(b"y")
    assert "AWS" not in str(caught.value)


def test_a_store_that_does_not_answer_is_told_by_uri_and_not_waited_for(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    place = locate("s3://bucket/run/", "http://127.0.0.1:9") / "config.yaml"
    assert (place.path, place.uri) == ("bucket/run/config.yaml", "s3://bucket/run/config.yaml")
    assert place.local_path is None
    told: list[str] = []

    def read() -> None:
        try:
            place.read()
        except StorageDown as error:
            told.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert len(told) == 1
    assert told[0].startswith("storage failed at s3://bucket/run/config.yaml: ")
    assert told[0].endswith(storage_errors.REMOTE_HINT)
    assert "\n" not in told[0]


def test_a_host_that_swallows_packets_is_given_up_soon():
    # A connection that is refused fails at once; one that hangs costs these.
    assert storage.ATTEMPTS * storage.CONNECT_SECONDS <= 60


def test_a_pipe_is_no_file_and_is_not_waited_for(place, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (
        lambda p: p.read(),
        lambda p: p.read_range(0, 1),
        lambda p: p.opened().__enter__(),
    ):
        with pytest.raises(BadInput, match="pipe is no file: remove what lies there"):
            read(place / "pipe")


@pytest.mark.parametrize("act", ["read", "size"])
def test_a_name_that_no_disk_takes_is_bad_input(place, act):
    with pytest.raises(BadInput, match="too long"):
        getattr(place / ("n" * 300), act)()
