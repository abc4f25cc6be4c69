"""Who computes which lanes: the only thing that changes with the number of workers."""


def share(lanes: int, world_size: int, rank: int) -> range:
    """The lanes of a worker: contiguous, all of them shared out, sizes differing by at most one.

    Raises:
        ValueError: there are more workers than lanes, or no such rank.
    """
    if not 0 <= rank < world_size <= lanes:
        raise ValueError(f"rank {rank} of {world_size} workers can't share {lanes} lanes")
    return range(lanes * rank // world_size, lanes * (rank + 1) // world_size)


def micro_batches(lanes: int, world_size: int, rank: int, most: int | None) -> list[range]:
    """A worker's lanes in the parts that go through the networks at once.

    All workers have as many parts: under ZeRO 2 and 3 they communicate in each. All but the last
    ones have `most` lanes, at least 2, so that compiled code meets one size whatever the number of
    workers; without `most` there is one part.
    """
    own = share(lanes, world_size, rank)
    if most is None:
        return [own]
    largest = -(-lanes // world_size)
    parts = -(-largest // most)
    made, start = [], own.start
    for left in reversed(range(parts)):
        # Each later part needs a lane.
        stop = min(start + most, own.stop - left)
        made.append(range(start, stop))
        start = stop
    return made
