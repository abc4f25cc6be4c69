"""`cat-ray doctor` finds faults that are really there: hosts in network namespaces of their own, with
other packages, a small /dev/shm and a firewall; a bucket that is read-only."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cat_ray.doctor.links import port_range

BIN = Path(sys.executable).parent
START_SECONDS, LIMIT_SECONDS = 120, 20
SHARED_MEMORY_BYTES, OBJECT_STORE_BYTES = 2**26, 10**8
WRONG_VERSION = "0.1.2"


class Host:
    """A machine of its own as far as the network is concerned, and a Ray node on it."""

    def __init__(self, stack: ExitStack, network: str, number: int):
        self.name, self.address = f"{network}-{number}", f"10.77.0.{number}"
        self._stack = stack
        wire = f"{network}w{number}"
        ip("netns", "add", self.name)
        stack.callback(ip, "netns", "del", self.name)
        ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", wire, "master", network, "up")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.name, "link", "set", device, "up")

    def start(self, *options: str, mount: str = "", **environment: str) -> subprocess.Popen:
        """Starts a Ray node here, in the foreground of a process that is ended with the test."""
        ray = [
            *(str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--num-cpus=2"),
            *(f"--node-ip-address={self.address}", f"--object-store-memory={OBJECT_STORE_BYTES}"),
            *options,
        ]
        # `ip netns exec` has given it a mount namespace: what is mounted there stays there.
        inside = ["sh", "-c", f'{mount}exec "$@"', "sh", *ray]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *inside],
            env={**os.environ, **HOST_ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._stack.callback(end, process)
        return process

    def drop(self, source: "Host") -> None:
        """What comes from another host to a port of the range vanishes, as in a firewall."""
        ports = "-".join(str(port) for port in port_range())
        match = ("from", source.address, "iif", "eth0", "ipproto", "tcp", "dport", ports)
        ip("-n", self.name, "rule", "add", *match, "blackhole")


# The name of the machine means 127.0.0.1 on all of them, which is not what a real host has.
HOST_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "of-this-test-alone-0123456789abcdef",
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


def wait_for(line: str, process: subprocess.Popen) -> None:
    assert process.stdout is not None
    told = []
    for text in process.stdout:
        told.append(text)
        if line in text:
            return
    raise AssertionError("".join(told)[-3000:])


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Three machines that reach each other; nothing runs on them yet."""
    with ExitStack() as stack:
        network = f"dr{os.getpid() % 100_000}"
        ip("link", "add", network, "type", "bridge")
        stack.callback(ip, "link", "del", network)
        ip("link", "set", network, "up")
        yield [Host(stack, network, number) for number in (1, 2, 3)]
