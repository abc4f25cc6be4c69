"""An all-reduce by real processes of torch.distributed, as a training job's, and its speed."""

import socket
import statistics
import time
from datetime import timedelta

import torch
from torch import distributed

REPETITIONS = 5
NCCL_BYTES, GLOO_BYTES = 2**28, 2**24


class Member:
    """One process of the group."""

    def free_port(self) -> int:
        """A port of this machine, chosen as Ray Train chooses the one where its workers meet."""
        with socket.socket() as free:
            free.bind(("", 0))
            return free.getsockname()[1]

    def reduce(
        self, rank: int, world_size: int, address: str, port: int, backend: str, seconds: float
    ) -> tuple[int, float, float]:
        """Meets the others and reduces with them.

        Args:
            rank: this process, from 0.
            world_size: how many there are.
            address: of process 0's machine.
            port: where process 0 waits for the others.
            backend: nccl or gloo.
            seconds: for how long any of it may take.

        Returns:
            Bytes of the large tensor, and the median seconds for it and for a single number.
        """
        host = f"[{address}]" if ":" in address else address
        distributed.init_process_group(
            backend,
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=seconds),
        )
        try:
            device = "cuda" if backend == "nccl" else "cpu"
            size = NCCL_BYTES if backend == "nccl" else GLOO_BYTES
            large = torch.zeros(size // 4, device=device)
            small = torch.ones(1, device=device)
            # The first makes the connections.
            distributed.all_reduce(small)
            if small.item() != world_size:
                raise RuntimeError(f"the sum of {world_size} ones came out as {small.item():g}")
            return size, _median_seconds(large), _median_seconds(small)
        finally:
            distributed.destroy_process_group()


def _median_seconds(values: torch.Tensor) -> float:
    taken = []
    for _ in range(REPETITIONS + 1):
        _finish(values)
        begun = time.perf_counter()
        distributed.all_reduce(values)
        _finish(values)
        taken.append(time.perf_counter() - begun)
    # The first is slower than those that follow.
    return statistics.median(taken[1:])


def _finish(values: torch.Tensor) -> None:
    if values.is_cuda:
        torch.cuda.synchronize()
