"""Training on several hosts: network namespaces, each with an address, a name and a Ray of its own.

They need root and iproute2, which `.ci/run` has.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cat_ray.checkpoint.layout import images_of
from cat_ray.operations.journal import read_rows
from cat_ray.storage import locate

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
)

BIN = Path(sys.executable).parent
SUBNET = "10.77.0"
WAIT_SECONDS = 300
# A host that is gone is found out sooner than by default.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Host:
    """A namespace of network, processes and names, with a Ray node in it.

    Its process ends all others in it with it.
    """

    name: str
    address: str
    process: subprocess.Popen[bytes]

    def inside(self, *command: str) -> list[str]:
        """The command that runs another one there."""
        pid = self.process.pid
        (first,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return ["nsenter", "--target", first, "--mount", "--uts", "--net", "--pid", *command]


@dataclass
class Network:
    """A switch, in a namespace of its own, that hosts are plugged into."""

    name: str
    folder: Path
    stack: ExitStack

    def host(self, number: int, *ray: str) -> Host:
        """A new one, on which `ray start` runs with these arguments."""
        name, address, port = f"{self.name}-{number}", f"{SUBNET}.{number}", f"port{number}"
        ip("netns", "add", name)
        self.stack.callback(ip, "netns", "delete", name)
        ip("link", "add", port, "netns", self.name, "type", "veth", "peer", "eth0", "netns", name)
        ip("-n", self.name, "link", "set", port, "master", "switch", "up")
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", name, "link", "set", device, "up")
        # `ip netns exec` puts it in the place of /etc/hosts.
        hosts = Path("/etc/netns") / name / "hosts"
        hosts.parent.mkdir(parents=True)
        self.stack.callback(shutil.rmtree, hosts.parent)
        hosts.write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        unshare = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        # Each has a /tmp/ray of its own, as its Ray would take another's for its own.
        options = ("--node-ip-address", address, "--disable-usage-stats", "--block", *ray)
        script = (
            f"hostname {name}; mkdir -p /tmp/ray; mount -t tmpfs tmpfs /tmp/ray; "
            f"{BIN}/ray start {' '.join(options)}"
        )
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, *unshare, "sh", "-c", script],
                env=os.environ | ENVIRONMENT,
                stdout=log,
                stderr=log,
            )
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return Host(name, address, process)

    def cut_off(self, number: int) -> None:
        """Whatever is sent to the host or by it is lost from now on, without a word."""
        ip("-n", self.name, "link", "set", f"port{number}", "down")


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    name = f"cat-ray-{os.getpid()}"
    with ExitStack() as stack:
        ip("netns", "add", name)
        stack.callback(ip, "netns", "delete", name)
        ip("-n", name, "link", "add", "switch", "type", "bridge")
        ip("-n", name, "link", "set", "switch", "up")
        yield Network(name, folder, stack)


def test_a_run_goes_on_when_a_host_is_cut_off(tmp_path: Path, tiny_job: str) -> None:
    values = yaml.safe_load(tiny_job)
    values["run"]["total_images"] = 1600
    values["workers"] |= {"minimum": 1, "maximum": 2, "cpus_per_worker": 1.5, "max_failures": 2}
    values["checkpoints"] = {"save_every_images": 160}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(values))
    run = locate(values["run"]["folder"])
    with network(tmp_path) as net:
        head = net.host(1, "--head", "--num-cpus", "0", "--include-dashboard", "false")
        address = f"{head.address}:6379"
        # A worker takes one and a half: each host has one.
        for number in (2, 3):
            net.host(number, "--address", address, "--num-cpus", "2")
        command = head.inside("env", f"RAY_ADDRESS={address}", f"{BIN}/cat-ray", "train", str(job))
        log = tmp_path / "train.log"
        with log.open("w") as file:
            driver = subprocess.Popen(
                command, env=os.environ | ENVIRONMENT, stdout=file, stderr=file
            )
        until = time.monotonic() + WAIT_SECONDS
        while not (saved := (run / "checkpoints").folders()):
            assert driver.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        net.cut_off(3)
        assert driver.wait(timeout=WAIT_SECONDS) == 0, log.read_text()[-3000:]
    groups = [row["message"] for row in read_rows(run) if row["kind"] == "event"]
    assert "2 workers" in groups[0] and "1 worker" in groups[-1], groups
    assert "starts from" in groups[-1] and "beginning" not in groups[-1], groups
    assert images_of(saved[0].name) < 1600 == read_rows(run)[-1]["images"]
