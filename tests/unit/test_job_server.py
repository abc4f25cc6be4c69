"""Job servers that misbehave: real sockets that never answer, drip, lie or break off."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from cat_ray.cli import app
from cat_ray.submission import transport

# Where our limits fail it is the servers that give up.
HANG_SECONDS = 30.0
DRIP_SECONDS = 0.05
VERSION = json.dumps({"ray_version": "2.60.0", "ray_commit": "c", "version": "4"}).encode()


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server on loopback that does the same with every connection; its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection = server.accept()[0]
                    threading.Thread(target=handle, args=(connection,), daemon=True).start()

        def handle(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                connection.settimeout(HANG_SECONDS)
                answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def asked(connection: socket.socket) -> bytes:
    """The head of a request."""
    request = b""
    while b"\r\n\r\n" not in request:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError
        request += piece
    return request


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def says(content: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        asked(connection)
        connection.sendall(content)

    return answer


def never(connection: socket.socket) -> None:
    asked(connection)
    connection.recv(1)


def drips(start: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        asked(connection)
        connection.sendall(start)
        for _ in range(round(HANG_SECONDS / DRIP_SECONDS)):
            time.sleep(DRIP_SECONDS)
            connection.sendall(b" ")

    return answer


def floods(start: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        asked(connection)
        connection.sendall(start)
        until = time.monotonic() + HANG_SECONDS
        while time.monotonic() < until:
            connection.sendall(piece)

    return answer


JSON = "Content-Type: application/json"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
FAULTS: dict[str, tuple[Callable[[socket.socket], None], int, str]] = {
    "it never answers": (never, 75, "didn't answer a request within"),
    "a head that drips": (drips(b"HTTP/1.1 200 OK\r\nX-A: "), 75, "didn't answer a request within"),
    "a body that drips": (
        drips(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{"),
        75,
        "didn't answer a request within",
    ),
    "it hangs up": (lambda connection: None, 75, "broke"),
    "it hangs up in mid-body": (says(http(VERSION)[:-9]), 75, "broke"),
    "502": (says(http(b"<html>", "502 Bad Gateway")), 75, "answers 502 Bad Gateway"),
    "503": (says(http(b"", "503 Later")), 75, "answers 503 Later"),
    "504": (says(http(b"", "504 Late")), 75, "answers 504 Late"),
    "500": (says(http(b"Traceback\n oh", "500 Oh")), 75, "500"),
    "a redirect": (
        says(http(b"", "302 Found", "Location: https://login.example/?next=x")),
        2,
        "redirects to https://login.example/?next=x",
    ),
    "a redirect to itself": (
        says(http(b"", "301 Moved", "Location: /api/version")),
        2,
        "redirects",
    ),
    "another server's page": (says(http(b"<!doctype html><p>hello")), 2, "doesn't answer as the"),
    "404": (says(http(b"404 page not found", "404 Not Found")), 2, "doesn't answer as the"),
    "418": (says(http(b"", "418 Teapot")), 2, "doesn't answer as the"),
    "a list": (says(http(b"[]", "200 OK", JSON)), 2, "doesn't answer as the"),
    "no version": (says(http(b"{}", "200 OK", JSON)), 2, "doesn't answer as the"),
    "a version of 5": (says(http(b'{"ray_version": 5}')), 2, "doesn't answer as the"),
    "a version of x": (says(http(b'{"ray_version": "\\u001b[2J x"}')), 2, "doesn't answer as"),
    "deep JSON": (says(http(50_000 * b"[")), 2, "doesn't answer as the"),
    "no UTF-8": (says(http(b"\xff\xfe\x00")), 2, "doesn't answer as the"),
    "no end": (floods(CHUNKED, b"10000\r\n" + 65536 * b"x" + b"\r\n"), 2, "more than"),
    "a head without end": (floods(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"), 2, "no dashboard of Ray"),
    "a long line": (floods(b"HTTP/1.1 200 OK\r\nX-A: ", 65536 * b"b"), 2, "no dashboard of Ray"),
    "SSH": (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH\r\n"), 2, "no dashboard of"),
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test can wait for."""
    # The client sets it, so that no other address wins over the one that was given.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setattr(transport, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(transport, "ANSWER_BYTES", 2**21)


def call(*arguments: str) -> Result:
    """A command; it must not hang, nor tell anything but lines of ours."""
    began = time.monotonic()
    result = CliRunner().invoke(app, arguments)
    assert time.monotonic() - began < HANG_SECONDS
    assert "unexpected" not in result.stderr and "\x1b" not in result.output
    return result


# All commands ask in the same way, from one client.
@pytest.mark.parametrize(
    "command", ["status", *(pytest.param(c, marks=pytest.mark.long) for c in ("stop", "submit"))]
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_misbehaves_is_one_line_and_an_exit_code(
    fault: str, command: str, job_file: Path
):
    answer, exit_code, told = FAULTS[fault]
    arguments = {"status": [], "stop": ["a-1"], "submit": [str(job_file)]}[command]
    with serving(answer) as address:
        result = call(command, *arguments, "--address", address)
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("cat-ray: ") and told in line and len(line) < 700


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 200), cut=st.integers(0, 40), put=st.binary(max_size=30))
@example(at=9, cut=3, put=b"1xx")
def test_whatever_bytes_a_server_answers_with_it_is_one_line(at: int, cut: int, put: bytes):
    content = http(VERSION, "200 OK", JSON)
    with serving(says(content[:at] + put + content[at + cut :])) as address:
        result = call("status", "--address", address)
    assert result.exit_code in (2, 75)
    assert len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize(
    "address",
    [
        "",
        "http://",
        "http://[::1",
        "http://host:port",
        "http://host:99999",
        "http://host:0",
        "ray://127.0.0.1:10001",
        "http://127.0.0.1:9/?a=b",
        "http://127.0.0.1:9/#a",
        "http://127.0.0.1:9 ",
        "http://127.0.0.1:9/\x1b[2J",
        "http://.:9",
        "http://nobody.invalid:8265",
        "http://127.0.0.1:9",
        "https://127.0.0.1:9",
    ],
)
def test_a_wrong_address_is_one_line_and_exit_code_2(address: str):
    result = call("status", "--address", address)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_credentials_in_an_address_are_refused_and_not_repeated():
    result = call("status", "--address", "http://me:hush@127.0.0.1:9")
    assert result.exit_code == 2
    assert "hush" not in result.output and "RAY_AUTH_TOKEN" in result.stderr


def test_what_has_no_tls_is_told_as_such():
    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(http(b"", "400 Bad Request"))

    with serving(answer) as address:
        result = call("status", "--address", address.replace("http:", "https:"))
    assert result.exit_code == 2
    assert "no TLS connection" in result.stderr and "write http://" in result.stderr
