"""A connection to the Ray cluster of RAY_ADDRESS, or to one of this machine's own."""

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping

from cat_ray.data.reading_task import CPUS_PER_READ
from cat_ray.errors import Unfinished
from cat_ray.storage import ENVIRONMENT


@contextlib.contextmanager
def connected(
    needed_cpus: float,
    environment: Mapping[str, str],
    exactly: int | None = None,
    reads: bool = True,
) -> Iterator[None]:
    """Connects for as long as the block lasts, unless there is a connection already.

    SIGTERM ends the block with `Unfinished`, where nothing inside sets another handler.

    Args:
        needed_cpus: what a cluster that is started here must have at least.
        exactly: how many it shall have, where that matters.
        environment: for the processes of a cluster that runs already.
        reads: whether shards are read: a cluster that is started here keeps processes for it.
    """
    logging.getLogger("ray").setLevel(logging.WARNING)
    # That a new cluster asks for a token, which its own processes have, is no warning.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # Only now: Ray Data sets its logger up as it is imported.
    import ray.data

    # What goes wrong there is raised as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    own = not ray.is_initialized()
    if own and "RAY_ADDRESS" in os.environ:
        ray.init(
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": {**ENVIRONMENT, **environment}},
        )
    elif own:
        cpus = exactly or max(os.cpu_count() or 1, math.ceil(needed_cpus))
        ray.init(
            # Without it a cluster that runs on this machine for something else would be used.
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            # Ray ends what is idle for a second beyond one process for each CPU. Reading tasks take
            # less than a CPU each, and starting one anew takes longer than a task. Where nothing is
            # read they only take time: Ray wakes each process a hundred times a second.
            _system_config={
                "num_workers_soft_limit": math.ceil(cpus / CPUS_PER_READ) + 1 if reads else 1
            },
        )
    try:
        # Ray's native handler, which was set just now, would dump its stack.
        with _stopped_by_sigterm() if own else contextlib.nullcontext():
            yield
    finally:
        if own:
            ray.shutdown()


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[int] = []

    def stop(number: int, frame: object) -> None:
        del frame
        told.append(number)
        # What Ctrl-C raises: Ray passes it on, any other exception is lost in its native calls.
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if not told:
            raise
        again = "stopped by SIGTERM: run the same command again to go on"
        raise Unfinished(again) from None
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
