"""Ends a worker whose training step stalls, so that the group starts again instead of hanging.

A main thread that hangs in a collective or in a read waits outside the interpreter: another thread
can see and end it. One that hangs while it holds the interpreter's lock stops the watchdog as well.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from cat_ray.storage import Location

# sysexits' EX_TEMPFAIL: another try may well succeed.
EXIT_STALLED = 75
STACKS = "stacks"
REPORT_SECONDS = 60.0
# From the end of a stalled worker until its run ends for it.
LATELY_SECONDS = 120.0
LOOKS = 10


class Watchdog:
    """Gives every step `stall_seconds`, from the first beat on; watches as a context manager.

    Args:
        stall_seconds: how long a step may take.
        on_stall: is told the stacks of all threads, once, in the watchdog's thread.
        excused: is asked before; if it says yes the step has its full allowance once more.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        stall_seconds: float,
        on_stall: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        excused: Callable[[], bool] = lambda: False,
    ):
        self._stall_seconds = stall_seconds
        self._on_stall = on_stall
        self._clock, self._excused = clock, excused
        self._interval = stall_seconds / LOOKS
        self._looked = clock()
        self._beaten: float | None = None
        self._rests = 0
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def beat(self) -> None:
        """A step has ended, the next begins."""
        with self._lock:
            self._beaten = self._clock()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Nothing is due within: for what is no step. The step after it has its full allowance."""
        with self._lock:
            self._rests += 1
        try:
            yield
        finally:
            with self._lock:
                self._rests -= 1
                self._renew(self._clock())

    def look(self) -> bool:
        """Whether the step has stalled: what the watchdog's thread asks at each wake-up."""
        with self._lock:
            now = self._clock()
            # A wake-up this late means that the whole process was stopped, and the step with it.
            if now - self._looked > 2 * self._interval:
                self._renew(now)
            self._looked = now
            if self._beaten is None or self._rests:
                return False
            return now - self._beaten >= self._stall_seconds

    def _renew(self, now: float) -> None:
        if self._beaten is not None:
            self._beaten = now

    def _watch(self) -> None:
        while not self._left.wait(self._interval):
            if self.look():
                if self._excused():
                    with self._lock:
                        self._renew(self._clock())
                    continue
                told = f"no training step ended within {self._stall_seconds:g} seconds\n\n"
                self._on_stall(told + stacks())
                return


def stacks() -> str:
    """The Python stacks of all threads of this process, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(identity, 'without a name')}:\n{''.join(traceback.format_stack(frame))}"
        for identity, frame in sys._current_frames().items()
    )


def has_stalled_lately(run: Location) -> bool:
    """Whether a worker of the run has ended itself just now because its step stalled."""
    left = [name.split("-")[0] for name in (run / STACKS).sizes()]
    return any(at.isdecimal() and time.time() - int(at) < LATELY_SECONDS for at in left)


def end_process(run: Location, rank: int) -> Callable[[str], None]:
    """What a worker does on a stall: it leaves the stacks in the run's folder, and exits.

    `sys.exit` would end the watchdog's thread only, and then wait for the main thread, which hangs.
    """

    def leave(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        (run / STACKS / f"{time.time():.0f}-rank-{rank}.txt").write(text.encode())

    def end(text: str) -> None:
        try:
            # In a thread that is not waited for: the stall may be the storage's own.
            leaving = threading.Thread(target=leave, args=(text,), name="stacks", daemon=True)
            leaving.start()
            leaving.join(REPORT_SECONDS)
        finally:
            os._exit(EXIT_STALLED)

    return end
