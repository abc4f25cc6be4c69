"""What several tests share: a tiny job, and groups of real processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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


RunGroup = Callable[..., None]


@pytest.fixture
def run_group() -> RunGroup:
    """Runs a script in so many gloo processes, and fails with their output if one fails."""

    def run(script: Path, world_size: int, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(world_size):
            environment = {
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "OMP_NUM_THREADS": "1",
            }
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(script), *arguments],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [process.communicate(timeout=600)[0] for process in processes]
        codes = [process.returncode for process in processes]
        assert codes == [0] * world_size, "\n".join(outputs)[-8000:]

    return run
