"""A Ray of this machine's own, which lives as long as the command that starts it.

Its daemons take no notice of SIGTERM, SIGHUP and Ctrl-C, nor do the workers: whoever sends one to
the command's process group, or to every process below it, wants the command to save, for which it
needs them. They are a process group of their own, which a keeper kills when the command is gone,
however it ended; the workers end with their raylet.
"""

import contextlib
import functools
import logging
import math
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import services

from cat_ray.cpus import usable_cpus
from cat_ray.data.reading_task import CPUS_PER_READ
from cat_ray.errors import BadInput, Unfinished
from cat_ray.stop_signals import unheeded

# The longest path of a socket on Linux, and the longest name that Ray gives to one in its folder.
SOCKET_BYTES = 107
LONGEST_SOCKET = "session_2026-11-28_00-59-53_927123_4194304/sockets/plasma_store"
SHORT_FOLDER = Path("/tmp/ray")
# Reads until the command, which holds the other end, closes it or dies; then kills its own group.
KEEPER = ("sh", "-c", "read _; kill -9 0")

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def local_cluster(needed_cpus: float, exactly: int | None, reads: bool) -> Iterator[None]:
    """Starts it and is connected to it; the arguments are those of `connection.connected`.

    Raises:
        BadInput: there is no folder for its files.
        Unfinished: it did not start in time.
    """
    folder = folder_for_ray()
    if folder == SHORT_FOLDER != (usual := usual_folder()):
        logger.warning("%s is too long a path for Ray's sockets: they lie in %s", usual, folder)
    with unheeded():
        keeper = subprocess.Popen(KEEPER, stdin=subprocess.PIPE, process_group=0)
    try:
        with unheeded(), _daemons_in_group(keeper.pid):
            _start(exactly or max(usable_cpus(), math.ceil(needed_cpus)), folder, reads)
        yield
    finally:
        ray.shutdown()
        # What the raylet had started and would have ended.
        os.killpg(keeper.pid, signal.SIGKILL)
        keeper.communicate()


def _start(cpus: int, folder: Path, reads: bool) -> None:
    try:
        _init(cpus, folder, reads)
    except Exception as error:
        # Ray has no class for it.
        if "timed out during startup" not in str(error):
            raise
        raise Unfinished(
            "Ray did not start in time: this machine may be too busy, or out of memory. Run the "
            f"same command again; its logs are below {folder}"
        ) from error


def _init(cpus: int, folder: Path, reads: bool) -> None:
    ray.init(
        # Without it a cluster that runs on this machine for something else would be used.
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _temp_dir=str(folder),
        # Ray ends what is idle for a second beyond one process for each CPU. Reading tasks take
        # less than a CPU each, and starting one anew takes longer than a task. Where nothing is
        # read they only take time: Ray wakes each process a hundred times a second.
        _system_config={
            "num_workers_soft_limit": math.ceil(cpus / CPUS_PER_READ) + 1 if reads else 1
        },
    )


class _Daemon(services.ConsolePopen):
    """One that Ray kills where it would send SIGTERM, in vain, and then wait for a second."""

    terminate = subprocess.Popen.kill


@contextlib.contextmanager
def _daemons_in_group(group: int) -> Iterator[None]:
    usual = services.ConsolePopen
    services.ConsolePopen = functools.partial(_Daemon, process_group=group)
    try:
        yield
    finally:
        services.ConsolePopen = usual


def usual_folder() -> Path:
    """Where Ray keeps its files by itself: below RAY_TMPDIR, TMPDIR or /tmp."""
    return Path(get_default_ray_temp_dir()).absolute()


def folder_for_ray() -> Path:
    """Where the logs and sockets lie: the usual folder, unless that is too long for sockets.

    Raises:
        BadInput: it can't be written to.
    """
    usual = usual_folder()
    folder = usual if len(os.fsencode(usual / LONGEST_SOCKET)) <= SOCKET_BYTES else SHORT_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(
            f"{folder}: Ray can't keep its files there: {reason}. Set RAY_TMPDIR to a short path "
            "of a folder that can be written to"
        ) from error
    return folder
