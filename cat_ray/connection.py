"""A connection to the Ray cluster of RAY_ADDRESS, or to one of this machine's own."""

import contextlib
import logging
from collections.abc import Iterator, Mapping

from cat_ray.errors import BadInput, RunFailed, Unfinished, last_line
from cat_ray.stop_signals import stoppable
from cat_ray.storage import ENVIRONMENT

SET_TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"


@contextlib.contextmanager
def connected(
    needed_cpus: float,
    environment: Mapping[str, str],
    exactly: int | None = None,
    reads: bool = True,
) -> Iterator[None]:
    """Connects for as long as the block lasts, unless there is a connection already.

    Args:
        needed_cpus: what a cluster that is started here must have at least.
        exactly: how many it shall have, where that matters.
        environment: for the processes of a cluster that runs already.
        reads: whether shards are read: a cluster that is started here keeps processes for it.

    Raises:
        BadInput: RAY_ADDRESS names no cluster that can be used.
        RunFailed: its versions are others than here.
        Unfinished: a signal other than Ctrl-C ended the block, and nothing inside handled it.
    """
    logging.getLogger("ray").setLevel(logging.WARNING)
    # That a new cluster asks for a token, which its own processes have, is no warning.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # Only now: Ray Data sets its logger up as it is imported.
    import ray.data

    # What goes wrong there is raised as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if ray.is_initialized():
        yield
        return
    from cat_ray.local_ray import local_cluster
    from cat_ray.ray_address import named_cluster

    with stoppable(), contextlib.ExitStack() as around:
        with _stopped_by_ray():
            address = named_cluster()
            around.enter_context(
                local_cluster(needed_cpus, exactly, reads)
                if address is None
                else _joined(address, {**ENVIRONMENT, **environment})
            )
        # Ray has taken SIGTERM for itself.
        with stoppable():
            yield


def check_connection() -> None:
    """Makes sure, before anything is written, that `connected` has a cluster to connect to.

    Raises:
        BadInput: RAY_ADDRESS names none, or one of this machine's own could not keep its files.
    """
    from cat_ray.local_ray import folder_for_ray
    from cat_ray.ray_address import named_cluster

    if named_cluster() is None:
        folder_for_ray()


@contextlib.contextmanager
def _stopped_by_ray() -> Iterator[None]:
    """Ray's own handler for SIGTERM, which it sets as it begins to start, ends the process."""
    try:
        yield
    except SystemExit:
        raise Unfinished("stopped by SIGTERM: run the same command again to go on") from None


@contextlib.contextmanager
def _joined(address: str, environment: Mapping[str, str]) -> Iterator[None]:
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": dict(environment)},
        )
    except AuthenticationError as error:
        raise BadInput(f"the cluster at RAY_ADDRESS wants a token: {SET_TOKEN}") from error
    except (OSError, ValueError) as error:
        raise BadInput(
            f"RAY_ADDRESS={address} can't be used: {last_line(error)}. If that cluster wants a "
            f"token, {SET_TOKEN}"
        ) from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        told = " ".join(str(error).split())
        raise RunFailed(f"{told} Use the cluster's image here as well") from error
    try:
        yield
    finally:
        ray.shutdown()
