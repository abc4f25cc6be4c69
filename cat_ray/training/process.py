"""How the process of a training worker uses the cores and the memory of its machine."""

import torch

from cat_ray.config import Workers

# Otherwise glibc gives the memory of a step's tensors back to the kernel and takes it anew in the
# next one. On a CPU the kernel then clears gigabytes in each step, and workers wait for each other.
_KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    # The step runs in a thread of Ray Train's; a thread's own memory comes in pieces of 64 MB.
    "MALLOC_ARENA_MAX": "1",
}


def worker_environment(workers: Workers) -> dict[str, str]:
    """What a worker's process must have in its environment when it starts."""
    return {} if workers.gpu else _KEEP_MEMORY


def set_threads(workers: Workers) -> None:
    """Gives PyTorch the job's number of threads: a sum's rounding depends on it."""
    torch.set_num_threads(max(1, int(workers.cpus_per_worker)))
