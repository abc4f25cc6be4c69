"""Signals that stop a command: the first one ends it in good order, a second one at once.

They come to the command alone, to its process group (`timeout`, a terminal) or to every process
that it started (systemd, Slurm). What a block of `unheeded` starts takes no notice of them.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

from cat_ray.errors import Unfinished

ENDING = (signal.SIGTERM, signal.SIGHUP)
STOPPING = (*ENDING, signal.SIGINT)
# `timeout` sends a signal twice, systemd may send SIGHUP right after SIGTERM: that is one request.
TOGETHER_SECONDS = 0.5
INTERRUPTED = 130
OUTPUTS = (1, 2)
SHOW_CURSOR = b"\x1b[?25h"

Stop = Callable[[str], None]


@contextlib.contextmanager
def stoppable(stop: Stop | None = None) -> Iterator[None]:
    """Ends its block at the first signal, and the process at the second one.

    Blocks may lie in each other; entering one takes the signals back from who took them meanwhile,
    as Ray does. Outside the main thread nothing changes. What is written to a terminal or a pipe
    that was closed is dropped: it must not end a run that is to save.

    Args:
        stop: is called with the signal's name, from a thread, instead of interrupting the block.

    Raises:
        Unfinished: SIGTERM or SIGHUP came, inside or before.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outermost = _watch is None
    watch = _watch = _watch or _Watch()
    stop_around, watch.stop = watch.stop, stop
    try:
        if watch.first is not None:
            raise KeyboardInterrupt
        watch.take_over()
        yield
    except KeyboardInterrupt:
        if watch.first not in ENDING:
            raise
        raise Unfinished(
            f"stopped by {watch.first.name}: run the same command again to go on"
        ) from None
    finally:
        watch.stop = stop_around
        if outermost:
            _watch = None
            watch.close()


@contextlib.contextmanager
def unheeded() -> Iterator[None]:
    """Processes that are started in this block, and theirs, never receive a stop signal.

    Unlike handlers, blocked signals stay blocked in a new program, whatever it sets.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        # One that waits is for us, not for who took the signals in the block.
        if _watch is not None:
            _watch.take_over()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_again() -> None:
    """Lets this process, which an `unheeded` one started, receive SIGTERM."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


class _Watch:
    """Sees signals from a thread of its own, also while the main thread is in native code."""

    def __init__(self) -> None:
        self.stop: Stop | None = None
        self.first: signal.Signals | None = None
        self._reacted = False
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._before: dict[signal.Signals, signal.Handlers | Callable | int | None] = {}
        self._fd_before = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._look, name="stop-signals", daemon=True)
        self._thread.start()

    def take_over(self) -> None:
        for number in STOPPING:
            handler = signal.getsignal(number)
            # What `nohup` ignores stays ignored.
            if number != signal.SIGHUP or handler != signal.SIG_IGN:
                self._before.setdefault(number, handler)
                signal.signal(number, self._handle)

    def give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._fd_before)

    def close(self) -> None:
        self.give_back()
        self._writing.close()
        self._thread.join()
        self._reading.close()

    def _handle(self, number: int, frame: object) -> None:
        """Interrupts the main thread, which runs this, if nothing else stops it."""
        del frame
        self.first = self.first or signal.Signals(number)
        if self.stop is None and not self._reacted:
            self._reacted = True
            # What Ctrl-C raises: Ray passes it on, any other exception is lost in its native calls.
            raise KeyboardInterrupt

    def _look(self) -> None:
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        for output in OUTPUTS:
            poll.register(output, 0)
        first_at: float | None = None
        while True:
            for descriptor, event in poll.poll():
                if descriptor != self._reading.fileno():
                    poll.unregister(descriptor)
                    if event != select.POLLNVAL:
                        _drop(descriptor)
                    continue
                # Python writes the number of each signal that has a handler.
                received = self._reading.recv(64)
                if not received:
                    return
                for number in (signal.Signals(n) for n in received if n in STOPPING):
                    if first_at is None:
                        first_at = time.monotonic()
                        self._begin_to_stop(number)
                    elif time.monotonic() > first_at + TOGETHER_SECONDS:
                        _end_at_once(number)

    def _begin_to_stop(self, number: signal.Signals) -> None:
        self.first = self.first or number
        if self.stop is not None:
            self._reacted = True
            # Not here: it may wait for a storage, and a second signal must not.
            threading.Thread(target=self.stop, args=(number.name,), daemon=True).start()


_watch: _Watch | None = None


def _forget_in_child() -> None:
    """A forked process is stopped alone: its signals would be told to the parent's thread."""
    global _watch
    if _watch is not None:
        _watch.give_back()
        _watch = None


os.register_at_fork(after_in_child=_forget_in_child)


def _drop(output: int) -> None:
    """Nobody reads this output any more: a terminal was closed, or the other end of a pipe."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, output)
    os.close(null)


def _end_at_once(number: signal.Signals) -> None:
    told = f"cat-ray: {number.name} again: ended at once. Run the same command again to go on\n"
    try:
        if os.isatty(1):
            # A progress bar hides it.
            os.write(1, SHOW_CURSOR)
        os.write(2, told.encode())
    finally:
        os._exit(INTERRUPTED if number == signal.SIGINT else Unfinished.exit_code)
