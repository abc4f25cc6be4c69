"""Brings what a run tells of itself to its folder, in the background: training never waits for it.

Figures, ledger, sample keys, grids: while the storage is down they wait here, and are delivered
once it is back. Only a checkpoint waits for them, so that whoever goes on from it finds all that
was told until then.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from cat_ray.errors import ExpectedError, StorageDown, StorageFull
from cat_ray.storage_errors import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS

logger = logging.getLogger(__name__)


class Tell(Protocol):
    """Does something that tells of a run, now or later.

    With a `key`, it replaces what still waits under that key, and is done at most every so many
    seconds.
    """

    def __call__(
        self, act: Callable[[], None], key: Hashable | None = None, every_seconds: float = 0.0
    ) -> None:
        """See above."""
        ...


def at_once(
    act: Callable[[], None], key: Hashable | None = None, every_seconds: float = 0.0
) -> None:
    """Tells in the caller's thread, who gets its errors."""
    del key, every_seconds
    act()


@dataclass
class _Waiting:
    act: Callable[[], None]
    due: float


class Telling:
    """A thread that does what it is given, in order; it lives until `close`.

    What fails because the storage is down or full is tried again until it succeeds. Any other
    failure is a warning: the training is worth more than what is told of it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[Hashable, _Waiting] = {}
        self._done_at: dict[Hashable, float] = {}
        self._under_way = False
        self._hurry = 0
        self._failure: ExpectedError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telling", daemon=True)
        self._thread.start()

    def put(
        self, act: Callable[[], None], key: Hashable | None = None, every_seconds: float = 0.0
    ) -> None:
        """See `Tell`."""
        with self._changed:
            due = self._done_at.get(key, -math.inf) + every_seconds if key is not None else 0.0
            self._waiting[object() if key is None else key] = _Waiting(act, due)
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Waits, at most so long, until all that was given is done; whether it is.

        Where there is no space left it doesn't wait.
        """
        with self._changed:
            self._hurry += 1
            self._changed.notify_all()
            try:
                return (
                    self._changed.wait_for(
                        lambda: self._idle() or isinstance(self._failure, StorageFull), seconds
                    )
                    and self._idle()
                )
            finally:
                self._hurry -= 1

    def close(self, seconds: float) -> None:
        """Flushes, then ends the thread; a warning says what is not delivered by then."""
        delivered = self.flush(seconds)
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        if not delivered:
            logger.warning(
                "figures of this session could not be delivered to the run's folder: %s",
                self._failure or f"it took longer than {seconds:g} s",
            )

    def _idle(self) -> bool:
        return not self._waiting and not self._under_way

    def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while (taken := self._take()) is not None:
            key, waiting = taken
            failure = _attempt(waiting.act)
            with self._changed:
                self._under_way = False
                if failure is not None:
                    # What was put under this key in the meantime is newer.
                    self._waiting = {key: waiting} | self._waiting
                    if self._failure is None:
                        logger.warning("%s; it is told later", failure)
                else:
                    self._done_at[key] = time.monotonic()
                self._failure = failure
                self._changed.notify_all()
            if failure is None:
                pause = FIRST_PAUSE_SECONDS
            else:
                self._closed.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _take(self) -> tuple[Hashable, _Waiting] | None:
        """The first that is due, waiting for it; None once all is over."""
        with self._changed:
            while not self._closed.is_set():
                now = math.inf if self._hurry else time.monotonic()
                for key, waiting in self._waiting.items():
                    if waiting.due <= now:
                        self._under_way = True
                        return key, self._waiting.pop(key)
                next_due = min((each.due for each in self._waiting.values()), default=math.inf)
                left = next_due - time.monotonic()
                self._changed.wait(None if math.isinf(left) else max(left, 0.0))
            return None


def _attempt(act: Callable[[], None]) -> ExpectedError | None:
    """The failure that a later attempt may not meet, or None."""
    try:
        act()
    except (StorageDown, StorageFull) as error:
        return error
    # Whatever a tracker or TensorBoard raises: the run goes on.
    except Exception as error:
        expected = isinstance(error, ExpectedError)
        logger.warning("not told: %s", error, exc_info=None if expected else error)
    return None
