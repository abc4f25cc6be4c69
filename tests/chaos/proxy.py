"""An HTTP proxy before an S3 server that misbehaves on schedule, and writes down what it did.

    python proxy.py PORT SERVER_HOST:PORT LOG

Orders are lines of JSON on the standard input, each answered by a line; the end of the input ends
it. The log has a line of JSON for each request: when, what was asked, and the fault that befell it.
"""

import asyncio
import json
import re
import socket
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from schedule import kind_of, schedule, step_of

HEAD_BYTES = 1 << 16
BLOCK_BYTES = 1 << 16
DRIP_BYTES, DRIP_SECONDS, FIRST_DRIP_SECONDS = 1 << 14, 0.05, 0.3
# Faults in which the server is asked; None is none.
PASSED_ON = (None, "killed", "slow", "cut answer", "cut head", "cut request")
CODES = {500: "InternalError", 503: "SlowDown", 409: "OperationAborted"}


@dataclass
class Request:
    """A request's first lines, and how long its body is: None where it comes in chunks."""

    method: str
    target: str
    head: bytes
    length: int | None
    expects: bool


class Cut(Exception):
    """Both connections are to be torn down now."""


class Proxy:
    """The front of one server; one event loop, one connection to the server for each request."""

    def __init__(self, port: int, server: str, log: Path):
        host, server_port = server.split(":")
        self._port, self._server = port, (host, int(server_port))
        self._log = log.open("a", buffering=1)
        self._began, self._windows = time.monotonic(), []
        self._now: str | None = None
        self._aimed: deque[tuple[str, str]] = deque()
        self._open: set[StreamWriter] = set()
        self._listener: asyncio.Server | None = None

    async def run(self) -> None:
        """Serves until the orders end."""
        await self._listen()
        watch = asyncio.create_task(self._watch())
        orders = StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
        while line := await orders.readline():
            answer = await self._obey(json.loads(line))
            print(json.dumps(answer), flush=True)
        watch.cancel()

    async def _obey(self, order: dict) -> object:
        name, value = order["order"], order.get("value")
        if name == "fault":
            self._now = value
            await self._open_or_close()
        elif name == "aim":
            self._aimed.extend([(value["kind"], value["fault"])] * value["count"])
        elif name == "left":
            return len(self._aimed)
        elif name == "forget":
            self._aimed.clear()
        elif name == "schedule":
            self._began, self._windows = time.monotonic(), schedule(**value)
            return [vars(window) for window in self._windows]
        else:
            raise ValueError(name)
        return None

    def _fault(self) -> str | None:
        moment = time.monotonic() - self._began
        return self._now or next((w.fault for w in self._windows if moment in w), None)

    async def _watch(self) -> None:
        while True:
            await self._open_or_close()
            await asyncio.sleep(0.02)

    async def _open_or_close(self) -> None:
        gone = self._fault() == "gone"
        if gone and self._listener is not None:
            self._listener.close()
            self._listener = None
            for writer in list(self._open):
                reset(writer)
        elif not gone and self._listener is None:
            await self._listen()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(
            self._serve, "127.0.0.1", self._port, limit=HEAD_BYTES
        )

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._open.add(writer)
        try:
            while (request := await read_request(reader)) is not None:
                if not await self._exchange(request, reader, writer):
                    break
        except (Cut, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            reset(writer)
        except asyncio.CancelledError:
            # The proxy ends.
            return
        finally:
            self._open.discard(writer)
            writer.close()

    def _befalls(self, *names: str | None) -> tuple[str | None, Callable[[], bool]]:
        """The fault that a request meets, and whether it lasts."""
        for aimed in self._aimed:
            if aimed[0] in (*names, "any"):
                self._aimed.remove(aimed)
                return aimed[1], lambda: True
        fault = self._fault()
        return fault, lambda: self._fault() == fault

    async def _exchange(self, request: Request, reader: StreamReader, writer: StreamWriter) -> bool:
        """One request; whether the client's connection can be used again."""
        kind = kind_of(request.method, request.target)
        fault, lasts = self._befalls(kind, step_of(request.method, request.target))
        server = None
        if fault in PASSED_ON:
            with suppress(OSError):
                server = await asyncio.open_connection(*self._server)
            fault = fault if server else "killed"
        self._write_down(request, kind, fault)
        if fault == "silent":
            while await reader.read(BLOCK_BYTES):
                pass
        if request.expects:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is not None and fault.isdigit():
            async for _ in body(request, reader):
                pass
            writer.write(refusal(request.method, int(fault)))
            await writer.drain()
            return True
        if server is None:
            raise Cut
        from_server, to_server = server
        self._open.add(to_server)
        hand_on = partial(drip, lasts) if fault == "slow" else hand_on_at_once
        try:
            await _ask(request, fault, reader, to_server, hand_on)
            return await _answer(request, fault, from_server, writer, hand_on)
        finally:
            self._open.discard(to_server)
            reset(to_server)

    def _write_down(self, request: Request, kind: str, fault: str | None) -> None:
        line = {
            "time": round(time.time(), 3),
            "method": request.method,
            "path": request.target,
            "kind": kind,
            "fault": fault,
        }
        self._log.write(json.dumps(line) + "\n")


async def _ask(
    request: Request,
    fault: str | None,
    reader: StreamReader,
    to_server: StreamWriter,
    hand_on: "HandOn",
) -> None:
    """Brings a request to the server; half of it, if it is to be cut."""
    cut = fault == "cut request"
    if cut and request.length == 0:
        raise Cut
    to_server.write(request.head)
    passed = 0
    async for block in body(request, reader):
        if cut and (request.length is None or passed + len(block) > request.length // 2):
            to_server.write(block[: len(block) // 2])
            await to_server.drain()
            raise Cut
        await hand_on(block, to_server)
        passed += len(block)
    await to_server.drain()


async def _answer(
    request: Request,
    fault: str | None,
    from_server: StreamReader,
    writer: StreamWriter,
    hand_on: "HandOn",
) -> bool:
    """Brings the server's answer back; half of it, if it is to be cut."""
    head = await from_server.readuntil(b"\r\n\r\n")
    length = header(head, "content-length")
    head = re.sub(rb"(?i)\r\nconnection: *close", b"", head)
    if fault == "cut head":
        # Its first line alone: curl takes that for a whole answer.
        writer.write(head[: head.index(b"\r\n") + 2])
        await writer.drain()
        return False
    if fault == "cut answer":
        content = await from_server.read(-1)
        writer.write(head + content[: len(content) // 2] if content else head[: len(head) // 2])
        await writer.drain()
        return False
    await asyncio.sleep(FIRST_DRIP_SECONDS if fault == "slow" else 0)
    await hand_on(head, writer)
    passed = 0
    while block := await from_server.read(BLOCK_BYTES):
        await hand_on(block, writer)
        passed += len(block)
    if length is not None and passed < int(length) and request.method != "HEAD":
        raise Cut
    await writer.drain()
    return True


HandOn = Callable[[bytes, StreamWriter], Awaitable[None]]


async def hand_on_at_once(block: bytes, writer: StreamWriter) -> None:
    """Writes a block."""
    writer.write(block)
    await writer.drain()


async def drip(lasts: Callable[[], bool], block: bytes, writer: StreamWriter) -> None:
    """Writes a block in small pieces, for as long as the fault lasts."""
    for begin in range(0, len(block), DRIP_BYTES):
        await hand_on_at_once(block[begin : begin + DRIP_BYTES], writer)
        await asyncio.sleep(DRIP_SECONDS if lasts() else 0)


async def read_request(reader: StreamReader) -> Request | None:
    """The next request's head, ready for the server; None at the end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
    length = header(head, "content-length")
    chunked = (header(head, "transfer-encoding") or "").lower() == "chunked"
    expects = (header(head, "expect") or "").lower() == "100-continue"
    # One connection for each request: its end is the answer's. Neither header is signed.
    head = re.sub(rb"(?i)\r\n(connection|expect): *[^\r]*", b"", head)
    head = head[:-2] + b"Connection: close\r\n\r\n"
    return Request(method, target, head, None if chunked else int(length or 0), expects)


def header(head: bytes, name: str) -> str | None:
    """A header's value, or None."""
    found = re.search(rb"(?i)\r\n" + name.encode() + rb": *([^\r]*)\r\n", head)
    return found[1].decode().strip() if found else None


async def body(request: Request, reader: StreamReader) -> AsyncIterator[bytes]:
    """A request's body as it was sent, block after block."""
    if request.length is None:
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
            if size == 0:
                return
    left = request.length
    while left:
        block = await reader.read(min(left, BLOCK_BYTES))
        if not block:
            raise Cut
        left -= len(block)
        yield block


def refusal(method: str, status: int) -> bytes:
    """An answer as S3 gives it; one to HEAD says nothing but its status."""
    code = CODES.get(status, "Unknown")
    content = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code></Error>'.encode()
    head = (
        f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + (b"" if method == "HEAD" else content)


def reset(writer: StreamWriter) -> None:
    """Ends a connection with RST, as a killed process does."""
    found = writer.get_extra_info("socket")
    with suppress(OSError):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()


if __name__ == "__main__":
    asyncio.run(Proxy(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])).run())
