"""Who computes which lanes: the only thing that changes with the number of workers."""


def share(lanes: int, world_size: int, rank: int) -> range:
    """The lanes of a worker: contiguous, all of them shared out, sizes differing by at most one.

    Raises:
        ValueError: there are more workers than lanes, or no such rank.
    """
    if not 0 <= rank < world_size <= lanes:
        raise ValueError(f"rank {rank} of {world_size} workers can't share {lanes} lanes")
    return range(lanes * rank // world_size, lanes * (rank + 1) // world_size)


def micro_batches(lanes: range, most: int | None) -> list[range]:
    """A worker's lanes in the parts that go through the networks at once.

    All parts but the last have `most` lanes, so that compiled code meets one size whatever the
    number of workers; without `most` there is one part.
    """
    size = most or len(lanes)
    return [lanes[start : start + size] for start in range(0, len(lanes), size)]
