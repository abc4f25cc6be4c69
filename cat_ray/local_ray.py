"""A Ray of this machine's own, which lives as long as the command that starts it.

Its daemons and workers take no notice of SIGTERM and SIGHUP: whoever sends them to all of a
command's processes wants the command to save, for which it needs them. When the command dies the
kernel kills the daemons, and the workers end with their raylet.
"""

import logging
import math
import os
from pathlib import Path

import ray
from ray._common.utils import get_default_ray_temp_dir

from cat_ray.cpus import usable_cpus
from cat_ray.data.reading_task import CPUS_PER_READ
from cat_ray.errors import BadInput
from cat_ray.stop_signals import unheeded

# The longest path of a socket on Linux, and the longest name that Ray gives to one in its folder.
SOCKET_BYTES = 107
LONGEST_SOCKET = "session_2026-11-28_00-59-53_927123_4194304/sockets/plasma_store"
SHORT_FOLDER = Path("/tmp/ray")

logger = logging.getLogger(__name__)


def start(needed_cpus: float, exactly: int | None, reads: bool) -> None:
    """Starts it and connects to it; the arguments are those of `connection.connected`.

    Raises:
        BadInput: there is no folder for its files.
    """
    cpus = exactly or max(usable_cpus(), math.ceil(needed_cpus))
    folder = folder_for_ray()
    if folder == SHORT_FOLDER != (usual := usual_folder()):
        logger.warning("%s is too long a path for Ray's sockets: they lie in %s", usual, folder)
    with unheeded():
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


def stop() -> None:
    """Disconnects and ends all of its processes."""
    node = ray._private.worker._global_node  # pyright: ignore
    for daemons in node.all_processes.values() if node is not None else ():
        for daemon in daemons:
            # Ray would begin with SIGTERM, and wait a second for each.
            daemon.process.terminate = daemon.process.kill
    ray.shutdown()


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
