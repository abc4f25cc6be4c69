"""A location on a real S3 server behind a proxy that misbehaves: right bytes, or `StorageDown`."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cat_ray import storage
from cat_ray.errors import StorageDown
from cat_ray.storage import Location, locate

CONTENT = np.random.default_rng(0).bytes(200_000)
# Upload in parts.
LARGE = np.random.default_rng(1).bytes(12 << 20)
FAULT_SECONDS, PATIENCE_SECONDS = 2.0, 60.0
# Those that no request survives.
FATAL = ("gone", "killed", "500", "503", "409", "408", "429", "cut request", "silent")


def reads(place: Location, _: Path) -> None:
    assert (place / "old").read() == CONTENT


def reads_a_range(place: Location, _: Path) -> None:
    assert (place / "old").read_range(1000, 150_000) == CONTENT[1000:150_000]


def reads_here_and_there(place: Location, _: Path) -> None:
    with (place / "old").opened() as file:
        file.seek(100_000)
        assert file.read(50) == CONTENT[100_000:100_050]
        file.seek(0)
        assert file.read() == CONTENT


def knows_sizes(place: Location, _: Path) -> None:
    assert (place / "old").size() == len(CONTENT)
    assert (place / "old").exists() and not (place / "none").exists()
    assert (place / "below").is_folder() and not (place / "none").is_folder()


def lists(place: Location, _: Path) -> None:
    assert place.sizes()["old"] == len(CONTENT)
    assert [folder.name for folder in place.folders()] == ["below", "folder"]
    assert (place / "below").files_below() == {"a": 1, "deeper/b": 2}


def writes(place: Location, _: Path) -> None:
    (place / "new").write(CONTENT)
    (place / "old").write(CONTENT)


def uploads(place: Location, folder: Path) -> None:
    (place / "large").upload(folder / "large")


def deletes(place: Location, _: Path) -> None:
    (place / "gone").delete()
    (place / "never").delete()


def deletes_a_folder(place: Location, _: Path) -> None:
    (place / "folder").delete_folder()


Operation = Callable[[Location, Path], None]
OPERATIONS: list[Operation] = [
    reads,
    reads_a_range,
    reads_here_and_there,
    knows_sizes,
    lists,
    writes,
    uploads,
    deletes,
    deletes_a_folder,
]


class Places:
    """For each operation a folder of its own on the server, with and without the proxy."""

    def __init__(self, chaos, s3_server, folder: Path):
        base = f"s3://{s3_server.bucket}/chaos-{time.time_ns()}"
        self._direct, self._folder = locate(base, s3_server.endpoint_url), folder
        self._proxied = locate(base, chaos.endpoint_url)
        (folder / "large").write_bytes(LARGE)
        for operation in OPERATIONS:
            place = self._direct / operation.__name__
            (place / "old").write(CONTENT)
            (place / "below" / "a").write(b"a")
            (place / "below" / "deeper" / "b").write(b"bb")
            (place / "gone").write(CONTENT)
            (place / "folder" / "a").write(b"a")

    def all_do(self, patience: float) -> dict[str, BaseException | None]:
        """What every operation raises; all of them at once."""
        raised = self.do(patience, *OPERATIONS)
        return {each.__name__: error for each, error in zip(OPERATIONS, raised, strict=True)}

    def do(self, patience: float, *operations: Operation) -> list[BaseException | None]:
        """What operations raise, all of them at once."""
        proxied = self._proxied.retried(patience)

        def raised_by(operation: Operation) -> BaseException | None:
            try:
                operation(proxied / operation.__name__, self._folder)
            except BaseException as error:
                return error
            return None

        with ThreadPoolExecutor(len(operations)) as pool:
            return list(pool.map(raised_by, operations))

    def check_nothing_torn(self, done: bool) -> None:
        """Whole files and no others; the new ones too, if they were written."""
        assert (self._direct / "writes" / "old").read() == CONTENT
        for name, place, content in (
            ("new", self._direct / "writes", CONTENT),
            ("large", self._direct / "uploads", LARGE),
        ):
            if done or (place / name).exists():
                assert (place / name).read() == content
        if done:
            assert "gone" not in (self._direct / "deletes").sizes()
            assert not (self._direct / "deletes_a_folder" / "folder").sizes()


@pytest.fixture
def places(chaos, s3_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    # Else a server that never answers takes a minute.
    monkeypatch.setattr(storage, "REQUEST_SECONDS", 1.0)
    return Places(chaos, s3_server, tmp_path)


@pytest.mark.parametrize("fault", [*FATAL, "cut answer", "slow"])
def test_a_fault_that_ends_before_the_patience_is_only_a_delay(fault, chaos, places) -> None:
    with chaos.lasting(fault, FAULT_SECONDS):
        raised = places.all_do(PATIENCE_SECONDS)
    assert raised == dict.fromkeys(raised)
    places.check_nothing_torn(done=True)
    # A killed server is met by nobody where it took as long to find that out.
    assert any(met == fault for _, met in chaos.hits()) or fault == "gone"


@pytest.mark.parametrize("fault", FATAL)
def test_a_fault_that_outlasts_the_patience_is_storage_down_and_nothing_else(
    fault, chaos, places
) -> None:
    chaos.begin(fault)
    raised = places.all_do(patience=0.0)
    assert {name: type(error) for name, error in raised.items()} == dict.fromkeys(
        raised, StorageDown
    )
    chaos.end()
    places.check_nothing_torn(done=False)


@pytest.mark.parametrize("fault", ["cut answer", "slow"])
def test_answers_that_break_off_or_drip_are_right_or_storage_down(fault, chaos, places) -> None:
    with chaos.lasting(fault, FAULT_SECONDS):
        raised = places.all_do(patience=0.0)
    assert {type(error) for error in raised.values()} <= {type(None), StorageDown}
    places.check_nothing_torn(done=False)


@pytest.mark.parametrize("fault", ["500", "cut request", "cut answer", "cut head"])
@pytest.mark.parametrize("step", ["begin upload", "upload part", "end upload"])
def test_an_upload_that_fails_at_any_step_says_so_and_then_succeeds(
    step, fault, chaos, s3_server, tmp_path
) -> None:
    (tmp_path / "large").write_bytes(LARGE)
    uri = f"s3://{s3_server.bucket}/steps/{step}-{fault}".replace(" ", "-")
    place, direct = locate(uri, chaos.endpoint_url), locate(uri, s3_server.endpoint_url)
    # More than Arrow tries by itself.
    chaos.aim(step, fault, 3 * storage.ATTEMPTS)
    try:
        place.upload(tmp_path / "large")
    except StorageDown:
        pass
    else:
        assert direct.read() == LARGE
    # Only one: the server has done what it could not say, and Arrow asks it again.
    for count in (0, 1):
        chaos.forget()
        chaos.aim(step, fault, count)
        place.retried(PATIENCE_SECONDS).upload(tmp_path / "large")
        assert direct.read() == LARGE
        direct.delete()


def test_an_answer_of_a_first_line_alone_is_not_taken_for_nothing(chaos, places) -> None:
    raised: list[BaseException] = []
    for kind in ("any", "content", "any", "content"):
        # Arrow gives whatever lay in memory: what was read before it, or something else.
        chaos.aim(kind, "cut head")
        raised += [error for error in places.all_do(PATIENCE_SECONDS).values() if error]
    assert not raised and not chaos.left()
    places.check_nothing_torn(done=True)


@pytest.mark.parametrize("read", [reads, reads_a_range, reads_here_and_there])
def test_what_lay_in_memory_is_never_taken_for_content(read, chaos, places) -> None:
    for answers, told in ((1, type(None)), (2, StorageDown)) * 3:
        chaos.aim("content", "cut head", answers)
        assert [type(error) for error in places.do(0.0, read)] == [told]
        assert not chaos.left()


def test_a_reader_sees_only_whole_versions_of_a_file_that_is_written_in_chaos(
    chaos, s3_server, places
) -> None:
    uri = f"s3://{s3_server.bucket}/versions/file"
    written = locate(uri, chaos.endpoint_url, retry_seconds=PATIENCE_SECONDS)
    read = locate(uri, s3_server.endpoint_url)
    versions = [bytes([version]) * (50_000 + version) for version in range(13)]
    written.write(versions[0])
    over, seen = threading.Event(), []

    def look() -> None:
        while not over.is_set():
            seen.append(read.read())

    reader = threading.Thread(target=look)
    reader.start()
    faults = ("cut request", "cut answer", "500", "gone", "silent", "cut head")
    for number, version in enumerate(versions[1:]):
        chaos.aim("any", faults[number % len(faults)], 1 + number % 4)
        written.write(version)
    over.set()
    reader.join()
    assert set(seen) <= set(versions)
    numbers = [content[0] for content in seen]
    assert numbers == sorted(numbers) and read.read() == versions[-1]


def test_a_file_whose_writer_fails_half_way_is_not_there(s3_server) -> None:
    place = locate(f"s3://{s3_server.bucket}/half/file", s3_server.endpoint_url)
    with pytest.raises(ZeroDivisionError), place.written() as file:
        file.write(CONTENT)
        raise ZeroDivisionError
    assert not place.exists()
