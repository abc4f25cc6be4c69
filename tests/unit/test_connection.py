"""What is checked before Ray starts or waits: RAY_ADDRESS, the folder of its sockets, the CPUs."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cat_ray import local_ray, ray_address
from cat_ray.cli import app
from cat_ray.cpus import usable_cpus
from cat_ray.errors import BadInput
from cat_ray.local_ray import (
    LONGEST_SOCKET,
    SHORT_FOLDER,
    SOCKET_BYTES,
    folder_for_ray,
    local_cluster,
)
from cat_ray.ray_address import named_cluster


def address_is(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that does as it is told with each connection."""
    # On all interfaces: Ray takes this machine's own address for 127.0.0.1.
    with socket.create_server(("", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@contextmanager
def short_folder() -> Iterator[Path]:
    """A new one whose path leaves room for sockets, unlike those of pytest."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize("address", ["", "local"])
def test_without_an_address_the_cluster_is_this_machines_own(monkeypatch, address):
    address_is(monkeypatch, address)
    assert named_cluster() is None


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://127.0.0.1:8265", "that is a dashboard"),
        ("https://head.example.org", "that is a dashboard"),
        ("ray://127.0.0.1:10001", "that is Ray Client"),
        ("grpc://127.0.0.1:1", "that is no address"),
        ("127.0.0.1", "that is no address"),
        ("head:ray", "that is no address"),
        (":6379", "that is no address"),
        ("user:secret@head:6379", "RAY_ADDRESS=...@head:6379: that is no address"),
        ("http://user:secret@head", "RAY_ADDRESS=http://...@head: that is a dashboard"),
        ("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1: Connection refused"),
        ("[::1]:1", "no Ray cluster answers at RAY_ADDRESS=[::1]:1: "),
        ("nowhere.invalid:6379", "no Ray cluster answers at RAY_ADDRESS=nowhere.invalid:6379: "),
    ],
)
def test_an_address_that_is_no_clusters_is_one_line(monkeypatch, address, told):
    address_is(monkeypatch, address)
    with pytest.raises(BadInput) as raised:
        named_cluster()
    line = str(raised.value)
    assert told in line and "as in 10.0.0.1:6379" in line and "\n" not in line


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n"), "something else"),
        (lambda connection: connection.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n"), "something"),
        (lambda connection: connection.close(), "Connection reset|Socket closed"),
        (lambda connection: None, "nothing came in 0.5 s"),
    ],
)
def test_what_listens_there_and_is_no_cluster_is_one_line(monkeypatch, answer, told):
    monkeypatch.setattr(ray_address, "ANSWER_SECONDS", 0.5)
    kept = []
    with listening(lambda connection: (kept.append(connection), answer(connection))) as address:
        address_is(monkeypatch, address)
        with pytest.raises(BadInput, match=told) as raised:
            named_cluster()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:8265", "ray://127.0.0.1:1"])
def test_training_with_such_an_address_writes_nothing(monkeypatch, address, job_file, tmp_path):
    address_is(monkeypatch, address)
    ended = CliRunner().invoke(app, ["train", str(job_file)])
    assert (ended.exit_code, len(ended.stderr.splitlines())) == (2, 1)
    assert f"RAY_ADDRESS={address}" in ended.stderr
    assert sorted(tmp_path.iterdir()) == [job_file]


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("beyond", [0, 1])
def test_the_folder_is_the_usual_one_while_sockets_fit_into_it(monkeypatch, variable, beyond):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    length = SOCKET_BYTES + beyond - len(f"/ray/{LONGEST_SOCKET}")
    with short_folder() as top:
        place = top / ("x" * (length - len(f"{top}/")))
        monkeypatch.setenv(variable, str(place))
        longest = place / "ray" / LONGEST_SOCKET
        longest.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as one:
            if beyond:
                with pytest.raises(OSError, match="too long"):
                    one.bind(str(longest))
                assert folder_for_ray() == SHORT_FOLDER
            else:
                one.bind(str(longest))
                assert folder_for_ray() == place / "ray"


def test_a_folder_that_is_none_is_one_line(monkeypatch, tmp_path, job_file):
    with short_folder() as top:
        (top / "file").write_text("")
        monkeypatch.setenv("RAY_TMPDIR", str(top / "file"))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        ended = CliRunner().invoke(app, ["train", str(job_file)])
    assert (ended.exit_code, len(ended.stderr.splitlines())) == (2, 1)
    assert "file/ray: Ray can't keep its files there: Not a directory" in ended.stderr
    assert sorted(tmp_path.iterdir()) == [job_file]


def test_cpus_are_those_that_this_process_may_use():
    allowed = os.sched_getaffinity(0)
    code = "from cat_ray.cpus import usable_cpus; print(usable_cpus())"
    one = ["taskset", "-c", str(min(allowed)), sys.executable, "-c", code]
    assert subprocess.run(one, capture_output=True, text=True).stdout == "1\n"
    assert 1 <= usable_cpus() <= len(allowed)


@pytest.mark.parametrize(
    ("needed", "exactly", "expected"), [(0.5, None, 3), (3.2, None, 4), (8, 2, 2)]
)
def test_a_cluster_of_ones_own_has_the_usable_cpus_or_what_is_needed(
    monkeypatch, needed, exactly, expected
):
    asked = {}
    monkeypatch.setattr(local_ray, "usable_cpus", lambda: 3)
    monkeypatch.setattr(local_ray.ray, "init", lambda **settings: asked.update(settings))
    with local_cluster(needed, exactly, reads=True):
        pass
    assert asked["num_cpus"] == expected
