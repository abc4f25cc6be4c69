"""What others ask of a worker between two of its steps: to give way, for one of three causes.

Process-wide, because it comes from other threads, from signal handlers and from Ray's controller. A
worker process belongs to one worker group, and ends with it.
"""

import logging
from threading import Event, Thread
from typing import Self

from cat_ray.errors import ExpectedError
from cat_ray.storage import Location
from cat_ray.training.preemption import NoticeBoard

NOTICES = NoticeBoard()
RESIZE = Event()
STOP = Event()

STOP_NAME = "stop"
LOCAL_POLL_SECONDS = 0.5
REMOTE_POLL_SECONDS = 5.0

logger = logging.getLogger(__name__)


def ask_to_resize() -> None:
    """Nodes came or are about to go: the group should save and start again in another size."""
    RESIZE.set()


def ask_to_stop(run: Location) -> None:
    """Makes whoever trains this run save and stop; from any machine that reaches its folder."""
    (run / STOP_NAME).write(b"")


def stop_is_asked(run: Location) -> bool:
    """Whether `ask_to_stop` was called, as far as the storage answers now."""
    return found((run / STOP_NAME).retried(0))


def found(place: Location) -> bool:
    """Whether a file is there; not as long as its storage doesn't answer."""
    try:
        return place.exists()
    except ExpectedError as error:
        logger.debug("%s", error)
        return False


def forget_stop(run: Location) -> None:
    """Takes back what `ask_to_stop` asked of an earlier call."""
    (run / STOP_NAME).delete()


class StopFile:
    """Looks for the file of `ask_to_stop`, from a thread of its own while in its block."""

    def __init__(self, run: Location):
        self._place = (run / STOP_NAME).retried(0)
        self._left = Event()
        self._thread = Thread(target=self._look, name="stop-file", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _look(self) -> None:
        seconds = LOCAL_POLL_SECONDS if self._place.local_path else REMOTE_POLL_SECONDS
        while not self._left.wait(seconds):
            if found(self._place):
                STOP.set()
                return
