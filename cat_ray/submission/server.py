"""A cluster's job server: the only place that talks to Ray's job API."""

import contextlib
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from cat_ray.errors import BadInput, last_line
from cat_ray.submission.ending import Ending
from cat_ray.submission.job import MARK

CONNECT_SECONDS = 5.0
AUTH_MODE = "RAY_AUTH_MODE"
TOKEN_PLACES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"

# What they tell at every call is for developers.
QUIET = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.authentication",
    "ray._private.runtime_env.packaging",
)


class ServerDown(BadInput):
    """The job server doesn't answer, or not as it should: it may do so again."""


class JobServer:
    """The job server of one cluster. Every method raises `BadInput` for what the user can mend, and
    `ServerDown` where nobody answers."""

    def __init__(self, address: str):
        """Connects, with Ray's token where the cluster asks for one.

        Args:
            address: of the dashboard, as in http://127.0.0.1:8265.
        """
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"--address {address}: write it as http://HOST:8265")
        self.address = address.rstrip("/")
        # Without it Ray lets these variables win over the address that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._explained():
            # Ray itself would wait for minutes where packets are lost.
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), CONNECT_SECONDS).close()
            self._client = self._connected()

    def _connected(self) -> JobSubmissionClient:
        try:
            return JobSubmissionClient(self.address)
        except AuthenticationError:
            # As `ray.init` does it for a cluster that runs, but only once a server has asked.
            if AUTH_MODE in os.environ or not maybe_enable_token_auth_if_token_available(False):
                raise
            return JobSubmissionClient(self.address)

    def is_this_machine(self) -> bool:
        """Whether all its nodes are here, and not behind a forwarded port."""
        with self._explained():
            nodes = list_nodes(self.address, filters=[("state", "=", "ALIVE")])
        return all(is_own_address(node.node_ip) for node in nodes)

    def submit(
        self,
        submission_id: str,
        entry_point: str,
        folder: Path,
        environment: dict[str, str],
        metadata: dict[str, str],
    ) -> None:
        """Sends a folder and starts the command in it, on the head."""
        with self._explained(submission_id):
            self._client.submit_job(
                submission_id=submission_id,
                entrypoint=entry_point,
                runtime_env={"working_dir": str(folder), "env_vars": environment},
                metadata=metadata,
            )

    def jobs(self) -> list[JobDetails]:
        """The jobs that were submitted by `cat-ray`, oldest first."""
        with self._explained():
            found = self._client.list_jobs()
        ours = [job for job in found if job.submission_id and MARK in (job.metadata or {})]
        return sorted(ours, key=lambda job: job.start_time or 0)

    def job(self, submission_id: str) -> JobDetails:
        """One job, whoever submitted it."""
        with self._explained(submission_id):
            return self._client.get_job_info(submission_id)

    def stop(self, submission_id: str) -> None:
        """Has SIGTERM sent to the command, and SIGKILL after the time that was set with it."""
        with self._explained(submission_id):
            self._client.stop_job(submission_id)

    def log(self, submission_id: str) -> str:
        """What the command has written so far."""
        with self._explained(submission_id):
            return self._client.get_job_logs(submission_id)

    async def tail(self, submission_id: str) -> AsyncIterator[str]:
        """What the command has written, and goes on to write, until it ends."""
        with self._explained(submission_id):
            async for piece in self._client.tail_job_logs(submission_id):
                yield piece

    @contextlib.contextmanager
    def _explained(self, submission_id: str = "") -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise BadInput(self._refused(str(error))) from error
        except (requests.ConnectionError, aiohttp.ClientError, OSError) as error:
            raise ServerDown(
                f"nobody answers at {self.address}: is it the address of the cluster's dashboard, "
                "with its port (8265), and reachable from here?"
            ) from error
        except (requests.RequestException, RayStateApiException, ValueError, KeyError) as error:
            raise self._strange(error) from error
        except RuntimeError as error:
            raise self._told(str(error), submission_id) from error

    def _refused(self, told: str) -> str:
        if told.startswith("Authentication required"):
            return (
                f"{self.address} asks for a token: set {AUTH_MODE}=token, and the cluster's token "
                f"in {TOKEN_PLACES}"
            )
        return f"{self.address} refuses the token of {TOKEN_PLACES}: is it another cluster's?"

    def _told(self, told: str, submission_id: str) -> BadInput:
        if "already exists" in told:
            return BadInput(f"{submission_id} exists already at {self.address}: submit once more")
        if "status code 404" in told and "does not exist" in told:
            return BadInput(
                f"{self.address} has no job {submission_id}: `cat-ray status` lists them"
            )
        return self._strange(told)

    def _strange(self, told: object) -> ServerDown:
        return ServerDown(
            f"{self.address} doesn't answer as the dashboard of Ray {ray.__version__} does: "
            f"{_line(told)}"
        )


def ending_of(job: JobDetails) -> Ending | None:
    """How a job ended; None while it is to start, or runs."""
    if not job.status.is_terminal():
        return None
    if job.status == JobStatus.SUCCEEDED:
        return Ending(stopped=False, code=0)
    return Ending(
        stopped=job.status == JobStatus.STOPPED,
        code=job.driver_exit_code,
        message=_line(job.message or ""),
    )


def _line(told: object) -> str:
    """The last line of what was told, its blanks made one."""
    return re.sub(r"\s+", " ", last_line(told))


def is_own_address(address: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
