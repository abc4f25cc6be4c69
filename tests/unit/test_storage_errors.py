"""What a storage's failures mean, and how long they are waited for."""

import errno
import os
import threading

import pytest

from cat_ray import storage_errors
from cat_ray.errors import BadInput, ExpectedError, NotFound, StorageDown, StorageFull
from cat_ray.storage import Location, locate
from cat_ray.storage_errors import explain, retry


class Pauses:
    """A clock that runs only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.slept = 100.0, list[float]()
        monkeypatch.setattr(storage_errors.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(storage_errors.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def failing(times: int, error: Exception | type[Exception]):
    """Answers after so many failures; how often it was asked is the list's length."""
    asked: list[int] = []

    def ask() -> str:
        asked.append(len(asked))
        if len(asked) <= times:
            raise error
        return "answer"

    return ask, asked


@pytest.mark.parametrize("times", [0, 1, 5])
def test_a_storage_that_is_down_is_asked_until_it_answers(monkeypatch, times):
    pauses = Pauses(monkeypatch)
    ask, asked = failing(times, StorageDown("down"))
    assert retry(ask, 300) == "answer"
    assert len(asked) == times + 1
    assert len(pauses.slept) == times


def test_pauses_grow_up_to_the_longest(monkeypatch):
    pauses = Pauses(monkeypatch)
    ask, _ = failing(12, StorageDown("down"))
    retry(ask, 300)
    whole = [
        min(storage_errors.FIRST_PAUSE_SECONDS * 2**n, storage_errors.LONGEST_PAUSE_SECONDS)
        for n in range(12)
    ]
    # Readers that failed together come back one by one.
    for slept, pause in zip(pauses.slept, whole, strict=True):
        assert pause / 2 <= slept <= pause


@pytest.mark.parametrize("seconds", [0, 0.4, 3, 60, 300])
def test_a_storage_that_stays_down_is_given_up_after_the_time(monkeypatch, seconds):
    pauses = Pauses(monkeypatch)
    ask, asked = failing(10**6, StorageDown("still down"))
    with pytest.raises(StorageDown, match="still down"):
        retry(ask, seconds)
    assert len(asked) == len(pauses.slept) + 1
    assert sum(pauses.slept) <= seconds
    # It gives up when the next pause would be over too late, and no earlier.
    assert sum(pauses.slept) + storage_errors.LONGEST_PAUSE_SECONDS > seconds


@pytest.mark.parametrize("error", [BadInput("no such key"), ValueError("ours"), KeyboardInterrupt])
def test_what_asking_again_will_not_mend_is_told_at_once(monkeypatch, error):
    pauses = Pauses(monkeypatch)
    ask, asked = failing(3, error)
    with pytest.raises(error if isinstance(error, type) else type(error)) as caught:
        retry(ask, 300)
    assert not isinstance(caught.value, StorageDown)
    assert (len(asked), pauses.slept) == (1, [])


URI = "s3://bucket/file"


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("When reading: AWS Error NETWORK_CONNECTION during GetObject: refused", StorageDown),
        ("AWS Error SLOW_DOWN during GetObject operation", StorageDown),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject", StorageDown),
        ("AWS Error INTERNAL_FAILURE (HTTP status 500)", StorageDown),
        ("AWS Error UNKNOWN (HTTP status 408) during PutObject", StorageDown),
        ("AWS Error UNKNOWN (HTTP status 409) during PutObject: conflict", StorageDown),
        ("AWS Error UNKNOWN (HTTP status 429) during GetObject", StorageDown),
        ("AWS Error REQUEST_TIMEOUT (HTTP status 400) during PutObject", StorageDown),
        ("AWS Error NO_SUCH_UPLOAD during CompleteMultipartUpload operation: gone", StorageDown),
        (
            "AWS Error UNKNOWN (HTTP status 400) during CompleteMultipartUpload operation: "
            "Unable to parse ExceptionName: InvalidPart Message: no such part",
            StorageDown,
        ),
        ("AWS Error ACCESS_DENIED during CompleteMultipartUpload operation", BadInput),
        ("AWS Error UNKNOWN (HTTP status 507) during PutObject", StorageFull),
        ("AWS Error UNKNOWN (HTTP status 301)", BadInput),
        ("AWS Error NO_SUCH_BUCKET during GetObject operation", BadInput),
        ("AWS Error NO_SUCH_KEY during GetObject operation", NotFound),
        ("AWS Error ACCESS_DENIED during GetObject operation", BadInput),
        ("AWS Error INVALID_ACCESS_KEY_ID (HTTP status 403)", BadInput),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during GetObject", BadInput),
        ("AWS Error UNKNOWN (HTTP status 400) during HeadObject", BadInput),
    ],
)
def test_what_a_store_says_is_an_outage_no_space_or_bad_input(reason, kind):
    error = explain(OSError(reason), URI, local=False)
    assert type(error) is kind
    assert URI in str(error)
    assert ("storage.region" in str(error)) == ("301" in reason)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EIO, StorageDown),
        (errno.ESTALE, StorageDown),
        (errno.ETIMEDOUT, StorageDown),
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EACCES, BadInput),
        (errno.EROFS, BadInput),
        (errno.ENOENT, NotFound),
    ],
)
def test_a_mount_that_is_away_is_an_outage_and_a_full_disk_is_none(number, kind):
    assert type(explain(OSError(number, os.strerror(number)), "/run", local=True)) is kind


def test_no_outage_is_bad_input_and_the_same_command_goes_on():
    for kind in (StorageDown, StorageFull):
        assert not issubclass(kind, BadInput)
        assert issubclass(kind, ExpectedError)
        assert kind.exit_code == 75


def test_whoever_is_stopped_waits_no_longer():
    stopped = threading.Event()
    stopped.set()
    ask, asked = failing(10**6, StorageDown("down"))
    with pytest.raises(StorageDown):
        retry(ask, 10**6, stopped)
    assert len(asked) == 1


OPERATIONS = {
    "size": lambda place: (place / "there").size(),
    "read": lambda place: (place / "there").read(),
    "read_range": lambda place: (place / "there").read_range(0, 1),
    "write": lambda place: (place / "new").write(b"new"),
    "delete": lambda place: (place / "there").delete(),
    "sizes": lambda place: place.sizes(),
    "folders": lambda place: place.folders(),
    "files_below": lambda place: place.files_below(),
    "is_folder": lambda place: place.is_folder(),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("failures", [1, 3])
def test_every_operation_on_a_place_is_retried(tmp_path, monkeypatch, name, failures):
    Pauses(monkeypatch)
    (tmp_path / "there").write_bytes(b"there")
    place = locate(str(tmp_path)).retried(300)
    expected = OPERATIONS[name](locate(str(tmp_path)))
    (tmp_path / "there").write_bytes(b"there")
    left = [failures]
    explained = Location._explained

    def failing_at_first(self: Location):
        if left[0]:
            left[0] -= 1
            raise StorageDown("away")
        return explained(self)

    monkeypatch.setattr(Location, "_explained", failing_at_first)
    found = OPERATIONS[name](place)
    assert left == [0]
    assert str(found).replace("300", "0.0") == str(expected).replace("300", "0.0")


def test_a_store_that_refuses_connections_is_down_and_may_come_back(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    with pytest.raises(StorageDown):
        (locate("s3://bucket/run/", "http://127.0.0.1:9") / "shard.tar").read_range(0, 10)
