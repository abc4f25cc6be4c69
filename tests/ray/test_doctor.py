"""`cat-ray doctor` finds faults that are really there: of two hosts in network namespaces one has
another package, a small /dev/shm and a firewall; and a bucket is read-only.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cat_ray.doctor.links import port_range

BIN = Path(sys.executable).parent
# Of the all-reduce, which can't come about where a port is blocked.
REDUCE_SECONDS = 10
OBJECT_STORE_BYTES = 10**8
SMALL_SHARED_MEMORY = "mount -t tmpfs -o size=64m tmpfs /dev/shm && "
GCS_PORT = 6379


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
            # Below the range of which any free port may be taken, as behind a firewall.
            *("--node-manager-port=9001", "--object-manager-port=9002"),
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

    def doctor(self) -> tuple[int, dict[str, dict[str, str]]]:
        """The exit code, and by check what didn't pass."""
        command = [str(BIN / "cat-ray"), "doctor", "--json", f"--reduce-seconds={REDUCE_SECONDS}"]
        return told(
            ["ip", "netns", "exec", self.name, *command],
            **HOST_ENVIRONMENT,
            RAY_ADDRESS=f"{self.address}:{GCS_PORT}",
        )

    def drop(self, source: "Host") -> None:
        """Of what another host sends only what is for or from Ray's own ports arrives any more."""
        ports = "-".join(str(port) for port in port_range())
        match = ("from", source.address, "iif", "eth0", "ipproto", "tcp")
        # The table of the own addresses, else the first, has to wait.
        ip("-n", self.name, "rule", "add", "pref", "100", "lookup", "local")
        ip("-n", self.name, "rule", "del", "pref", "0")
        rule = ("pref", "50", *match, "sport", ports, "dport", ports, "blackhole")
        ip("-n", self.name, "rule", "add", *rule)


# The name of the machine means 127.0.0.1 on all of them, which is not what a real host has.
HOST_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "of-this-test-alone-0123456789abcdef",
}


def told(command: list[str], **environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    ended = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert ended.returncode in (0, 1), ended.stderr[-3000:]
    found = json.loads(ended.stdout)["findings"]
    return ended.returncode, {each["check"]: each for each in found if each["verdict"] != "pass"}


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
    """Two machines that reach each other; nothing runs on them yet."""
    with ExitStack() as stack:
        network = f"dr{os.getpid() % 100_000}"
        ip("link", "add", network, "type", "bridge")
        stack.callback(ip, "link", "del", network)
        ip("link", "set", network, "up")
        yield [Host(stack, network, number) for number in (1, 2)]


@pytest.fixture
def other_deepspeed(tmp_path: Path) -> str:
    """A folder for PYTHONPATH, where the record of another version of DeepSpeed is found first."""
    record = tmp_path / "packages" / "deepspeed-0.1.2.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1.2\n")
    return os.pathsep.join([str(record.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_a_wrong_version_little_shared_memory_and_a_blocked_port_are_found_on_their_node(
    hosts: list[Host], other_deepspeed: str
) -> None:
    good, bad = hosts
    # Ray's sockets lie in it, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="doctor-", dir="/tmp") as temp:
        head = good.start(
            "--head", f"--port={GCS_PORT}", "--include-dashboard=false", f"--temp-dir={temp}"
        )
        wait_for("Ray runtime started", head)
        joined = bad.start(
            f"--address={good.address}:{GCS_PORT}",
            mount=SMALL_SHARED_MEMORY,
            PYTHONPATH=other_deepspeed,
        )
        wait_for("Ray runtime started", joined)

        code, found = good.doctor()
        assert code == 1
        assert found.keys() == {"versions", "shared memory", "storage"}
        assert found["storage"]["verdict"] == "warn"
        assert found["versions"]["found"].startswith(f"deepspeed 0.19.8 on {good.address}, 0.1.2 ")
        assert bad.address in found["versions"]["found"]
        assert "deepspeed==0.19.8" in found["versions"]["advice"]
        assert f"{bad.address}: 67.1 MB of 100 MB" in found["shared memory"]["found"]
        assert good.address not in found["shared memory"]["found"]

        bad.drop(good)
        code, found = good.doctor()
        assert code == 1
        assert found.keys() == {"versions", "shared memory", "storage", "ports", "all-reduce"}
        first, last = port_range()
        assert f"{good.address} to {bad.address}: port {first}, " in found["ports"]["found"]
        assert f", {last} (timed out)" in found["ports"]["found"]
        assert "GLOO_SOCKET_IFNAME" in found["all-reduce"]["advice"]
        for process in (joined, head):
            end(process)


@pytest.fixture
def read_only_endpoint(s3_server) -> Iterator[str]:
    """Another front of the same server, which refuses every write."""
    with s3_server.also_read_only() as endpoint_url:
        yield endpoint_url


def test_a_read_only_bucket_fails_and_nothing_is_left_anywhere(
    job_file: Path, tmp_path: Path, s3_server, read_only_endpoint: str
) -> None:
    s3_server.client.put_object(Bucket=s3_server.bucket, Key="doctor/mine", Body=b"precious")
    before = contents(s3_server)
    command = [str(BIN / "cat-ray"), "doctor", str(job_file), "--json"]
    changes = (
        f"run.folder=s3://{s3_server.bucket}/doctor/of-this/run",
        f"storage.endpoint_url={s3_server.endpoint_url}",
        f"data.shards=s3://{s3_server.bucket}/doctor/shards",
    )
    command += [part for change in changes for part in ("--set", change)]
    place = ("--storage", f"s3://{s3_server.bucket}/doctor", "--endpoint-url", read_only_endpoint)
    code, found = told([*command, *place])
    assert code == 1
    assert found.keys() == {"storage: --storage"}
    assert "write failed" in found["storage: --storage"]["found"]
    assert "read-only" in found["storage: --storage"]["advice"]
    assert contents(s3_server) == before
    assert list(tmp_path.iterdir()) == [job_file]


def contents(server) -> dict[str, str]:
    """What is in the bucket; the empty mark of a folder that Arrow leaves on S3 is no content."""
    found = server.client.list_objects_v2(Bucket=server.bucket).get("Contents", [])
    return {each["Key"]: each["ETag"] for each in found if each["Key"] != "doctor/"}
