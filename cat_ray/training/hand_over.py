"""Workers whose machines go hand their slices to workers that stay, which save both."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from cat_ray.checkpoint.write import Slice


def hand_over(
    own: Sequence[Slice], partners: Mapping[int, int], group: Any = None
) -> dict[int, list[Slice]]:
    """Sends this worker's slices if it leaves, receives others' if it is their partner.

    Args:
        own: this worker's slices.
        partners: for each rank that leaves the one that takes its slices, the same everywhere.
        group: a process group on the CPU.

    Returns:
        The slices taken over, by the rank whose they were.
    """
    rank = distributed.get_rank()
    taken: dict[int, list[Slice]] = {}
    for leaving, partner in sorted(partners.items()):
        if rank == leaving:
            _send(own, partner, group)
        elif rank == partner:
            taken[leaving] = _receive(leaving, group)
    return taken


@torch.no_grad()
def _send(slices: Sequence[Slice], to: int, group: Any) -> None:
    described = [(s.group, s.tensor, s.shape, s.offset, len(s.values)) for s in slices]
    distributed.send_object_list([described], dst=to, group=group)
    distributed.send(torch.cat([s.values.cpu() for s in slices]), dst=to, group=group)


def _receive(sender: int, group: Any) -> list[Slice]:
    described: list[Any] = [None]
    distributed.recv_object_list(described, src=sender, group=group)
    lengths = [length for *_, length in described[0]]
    values: Tensor = torch.empty(sum(lengths))
    distributed.recv(values, src=sender, group=group)
    return [
        Slice(name, tensor, shape, offset, part)
        for (name, tensor, shape, offset, _), part in zip(
            described[0], values.split(lengths), strict=True
        )
    ]
