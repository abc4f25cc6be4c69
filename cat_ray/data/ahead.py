"""Reading ahead: what is asked for next is on its way while what came is worked on."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def in_order(
    readers: Executor, ask: Callable[[Item], Answer], items: Iterable[Item], ahead: int
) -> Iterator[Answer]:
    """The answer for each item, in order; so many are asked for before the first is needed."""
    left = iter(items)
    coming: deque[Future[Answer]] = deque(readers.submit(ask, item) for item in islice(left, ahead))
    while coming:
        answer = coming.popleft().result()
        coming.extend(readers.submit(ask, item) for item in islice(left, 1))
        yield answer
