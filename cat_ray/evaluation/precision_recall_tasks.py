"""Precision and recall of large sets: blocks of their rows, shared out to tasks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch

from cat_ray.evaluation.measurement import Workers
from cat_ray.evaluation.precision_recall import ROWS, Balls, reach
from cat_ray.evaluation.workers import begin_work, resources_of

# Which of the two sets, and the first of `ROWS` rows of it.
Block = tuple[int, int]


def precision_and_recall(
    samples: np.ndarray, reals: np.ndarray, workers: Workers
) -> dict[str, float]:
    """Of features `[N, d]` and `[M, d]`, float64; the same bits for any number of workers."""
    sets = (samples, reals)
    blocks = [(place, row) for place, own in enumerate(sets) for row in range(0, len(own), ROWS)]
    held = [ray.put(own) for own in sets]
    radii = [ray.put(own) for own in _shared(_radii, blocks, workers, *held)]
    inside = _shared(_inside, blocks, workers, *held, *radii)
    return {"precision": float(inside[0].mean()), "recall": float(inside[1].mean())}


def _shared(
    work: Callable[..., list[np.ndarray]], blocks: list[Block], workers: Workers, *held: Any
) -> list[np.ndarray]:
    """What `work` makes of all blocks, for each set in the order of its rows."""
    # A process that gave way to others doesn't serve them afterwards.
    task = ray.remote(max_calls=1, **resources_of(workers))(_in_task)
    shares = [blocks[first :: workers.count] for first in range(workers.count)]
    made = ray.get([task.remote(work, share, workers, *held) for share in shares])
    found = {
        block: values
        for share, results in zip(shares, made, strict=True)
        for block, values in zip(share, results, strict=True)
    }
    return [np.concatenate([found[block] for block in blocks if block[0] == own]) for own in (0, 1)]


def _in_task(
    work: Callable[..., list[np.ndarray]], share: list[Block], workers: Workers, *held: np.ndarray
) -> list[np.ndarray]:
    device = begin_work(workers)
    # A copy: torch knows no memory that is read only, as Ray's is.
    tensors = [torch.from_numpy(np.array(own)).to(device) for own in held]
    return work(share, *tensors)


def _radii(share: list[Block], *sets: torch.Tensor) -> list[np.ndarray]:
    return [reach(sets[own][row : row + ROWS], sets[own]).cpu().numpy() for own, row in share]


def _inside(share: list[Block], *held: torch.Tensor) -> list[np.ndarray]:
    sets, balls = held[:2], [Balls(*pair) for pair in zip(held[:2], held[2:], strict=True)]
    return [balls[1 - own].hold(sets[own][row : row + ROWS]).cpu().numpy() for own, row in share]
