"""One command at a time in a folder, whoever comes at whatever moment, and however it ends."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cat_ray import folder_lock
from cat_ray.errors import BadInput
from cat_ray.folder_lock import PREFIX, SUFFIX, Claim, _claim, is_gone, is_lock, locked
from cat_ray.storage import Location, locate


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(folder_lock, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(folder_lock, "POLL_SECONDS", 0.05)


def other(folder: Location, **changes: object) -> Claim:
    """Another machine's claim, as its file says it."""
    claim = replace(_claim("cat-ray train"), machine="elsewhere", host="node-7", holds=True)
    claim = replace(claim, **changes)
    (folder / claim.name).write(json.dumps(asdict(claim)).encode())
    return claim


def locks(folder: Location) -> list[str]:
    return [name for name in folder.sizes() if is_lock(name)]


def test_a_folder_is_held_for_the_block_and_free_afterwards(folder):
    with locked(folder, "cat-ray train"):
        assert len(locks(folder)) == 1
    assert locks(folder) == []
    with locked(folder, "cat-ray train"):
        pass


def test_a_second_command_is_refused_and_told_who_holds_the_folder(folder):
    with (
        locked(folder, "cat-ray train"),
        pytest.raises(BadInput, match=rf"`cat-ray train` on .*, process {os.getpid()}: wait"),
        locked(folder, "cat-ray fid"),
    ):
        pytest.fail("both are in")
    assert locks(folder) == []


def test_a_holder_on_another_machine_is_seen_alive_by_its_renewals(folder):
    claim, left = other(folder), threading.Event()

    def renew() -> None:
        renewed = 0
        while not left.wait(0.1):
            renewed += 1
            other(folder, name=claim.name, renewed=renewed)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(BadInput, match="node-7"), locked(folder, "cat-ray train"):
            pytest.fail("both are in")
    finally:
        left.set()
        thread.join()


def test_a_dead_holder_on_another_machine_is_waited_for_no_longer_than_its_lease(folder):
    claim = other(folder)
    began = time.monotonic()
    with locked(folder, "cat-ray train"):
        assert time.monotonic() - began >= 1.0
        assert claim.name not in locks(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": 3}', b"\xff" * 100, b"[" * 9999])
def test_a_file_that_cannot_be_read_is_waited_for_and_then_removed(folder, content):
    (folder / f"{PREFIX}0{SUFFIX}").write(content)
    with locked(folder, "cat-ray train"):
        assert len(locks(folder)) == 1


def test_a_holder_whose_lease_is_very_old_is_not_waited_for(folder, monkeypatch):
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 10**6)
    other(folder, time=time.time() - 2 * 10**6)
    with locked(folder, "cat-ray train"):
        pass


def test_a_holder_that_was_killed_on_this_machine_is_not_waited_for(folder, monkeypatch):
    code = (
        "import os, signal, sys\n"
        "from cat_ray.folder_lock import locked\n"
        "from cat_ray.storage import locate\n"
        "with locked(locate(sys.argv[1]), 'cat-ray train'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, folder.path], check=False)
    assert len(locks(folder)) == 1
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 10**6)
    with locked(folder, "cat-ray train"):
        assert len(locks(folder)) == 1


def test_a_process_that_took_a_dead_holders_number_is_not_the_holder():
    own = _claim("cat-ray train")
    assert not is_gone(own)
    assert is_gone(replace(own, started=own.started - 1))
    assert not is_gone(replace(own, started=own.started - 1, machine="elsewhere"))


@pytest.mark.parametrize("together", [2, 5])
@pytest.mark.parametrize("attempt", range(5))
def test_of_those_that_come_at_the_same_moment_exactly_one_goes_in(folder, together, attempt):
    del attempt
    start, all_over = threading.Barrier(together), threading.Barrier(together)
    inside: list[int] = []
    refused: list[str] = []

    def come(number: int) -> None:
        start.wait()
        try:
            with locked(folder, f"command {number}"):
                inside.append(number)
                all_over.wait()
        except BadInput as error:
            refused.append(str(error))
            all_over.wait()

    threads = [threading.Thread(target=come, args=(number,)) for number in range(together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 1
    assert len(refused) == together - 1


def test_a_holder_whose_lock_was_taken_ends_at_once(folder):
    code = (
        "import sys, time\n"
        "from cat_ray import folder_lock\n"
        "from cat_ray.storage import locate\n"
        "folder_lock.RENEW_SECONDS = 0.1\n"
        "folder = locate(sys.argv[1])\n"
        "with folder_lock.locked(folder, 'cat-ray train'):\n"
        "    for name in folder.sizes():\n"
        "        (folder / name).delete()\n"
        "    time.sleep(60)\n"
        "print('went on')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, folder.path], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 75
    assert "taken over" in ended.stderr
    assert ended.stdout == ""


def test_a_process_here_that_was_stopped_for_long_still_holds_the_folder(folder, monkeypatch):
    with locked(folder, "cat-ray train"):
        now = time.time()
        monkeypatch.setattr(folder_lock.time, "time", lambda: now + 10**6)
        with pytest.raises(BadInput, match="is in use"), locked(folder, "cat-ray fid"):
            pytest.fail("both are in")
