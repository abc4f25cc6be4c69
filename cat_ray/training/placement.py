"""Moves what was made on the CPU to the device that computes, without waiting for it."""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The same values on the device.

    A copy from ordinary memory waits for all that the GPU has to do; one from pinned memory joins
    the queue.
    """
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
