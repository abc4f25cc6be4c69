"""TCP between nodes, on ports of the range that gloo, NCCL and torch's rendezvous use."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cat_ray.doctor.facts import Link

GREETING = b"cat-ray doctor"
LINUX_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Where Linux's file is not, that of IANA, which macOS has as well.
OTHER_RANGE = (49152, 65535)
BACKLOG = 1024
CONNECTING_THREADS = 32


def port_range() -> tuple[int, int]:
    """First and last of the ports that this machine gives to who asks for any free one."""
    if not LINUX_RANGE.exists():
        return OTHER_RANGE
    first, last = LINUX_RANGE.read_text().split()
    return int(first), int(last)


class Listener:
    """Listens on a low, a middle and a high port of the range, and greets who connects."""

    def __init__(self, ipv6: bool = False):
        first, last = port_range()
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        starts = (range(first, last), range((first + last) // 2, last), range(last, first, -1))
        self._sockets = [_listening(family, iter(ports)) for ports in starts]
        for listening in self._sockets:
            threading.Thread(target=_greet, args=(listening,), daemon=True).start()

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports it listens on."""
        return tuple(each.getsockname()[1] for each in self._sockets)

    def close(self) -> None:
        """Listens no longer."""
        for each in self._sockets:
            # Wakes the thread that waits in accept, which closing alone doesn't.
            each.shutdown(socket.SHUT_RDWR)
            each.close()


def _listening(family: socket.AddressFamily, ports: Iterator[int]) -> socket.socket:
    for port in ports:
        try:
            return socket.create_server(("", port), family=family, backlog=BACKLOG)
        except OSError:
            continue
    raise OSError("no port of the range is free")


def _greet(listening: socket.socket) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            connection.sendall(GREETING)


def links_to(
    source: str, targets: list[tuple[str, str, tuple[int, ...]]], seconds: float
) -> list[Link]:
    """Connects from here to each of some listeners.

    Args:
        source: the name of this node.
        targets: of each listener the node's name, its address and its ports.
        seconds: after which a port that doesn't answer is blocked.
    """
    with ThreadPoolExecutor(CONNECTING_THREADS) as threads:
        asked = [
            {port: threads.submit(_reason_against, address, port, seconds) for port in ports}
            for _, address, ports in targets
        ]
        answers = [
            {port: reason for port, each in asking.items() if (reason := each.result())}
            for asking in asked
        ]
    return [
        Link(source, name, ports, blocked)
        for (name, _, ports), blocked in zip(targets, answers, strict=True)
    ]


def _reason_against(address: str, port: int, seconds: float) -> str:
    """Why no connection came about; nothing if one did."""
    try:
        with socket.create_connection((address, port), timeout=seconds) as connection:
            greeting = connection.recv(len(GREETING))
    except OSError as error:
        return error.strerror or str(error)
    return "" if greeting == GREETING else "something else answers"
