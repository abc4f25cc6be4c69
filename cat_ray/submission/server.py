"""A cluster's job server: the only place, with `transport.py`, that talks to Ray's job API."""

import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import aiohttp
import ray
import requests
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus
from ray.util.state.common import ListApiOptions, StateResource
from ray.util.state.exception import RayStateApiException

from cat_ray.errors import BadInput
from cat_ray.submission.ending import Ending
from cat_ray.submission.job import MARK
from cat_ray.submission.transport import (
    JobClient,
    NoDashboard,
    ServerDown,
    StateClient,
    certificates,
    explain,
    one_line,
)

AUTH_MODE = "RAY_AUTH_MODE"
TOKEN_PLACES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
# The last moment that a calendar has, in milliseconds.
LATEST = 253_402_214_400_000

# What they tell at every call is for developers.
QUIET = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.authentication",
    "ray._private.runtime_env.packaging",
)


class NoSuchJob(BadInput):
    """The server knows no job of this id."""


class JobExists(BadInput):
    """The server has a job of this id already."""


class JobServer:
    """The job server of one cluster. Every method raises `BadInput` for what the user can mend, and
    `ServerDown` where nobody answers."""

    def __init__(self, address: str):
        """Connects, with Ray's token where the cluster asks for one.

        Args:
            address: of the dashboard, as in http://127.0.0.1:8265.

        Raises:
            BadInput: it is none, or no dashboard answers there.
            ServerDown: it takes requests, and doesn't answer them.
        """
        self.address = _checked(address)
        # Without it Ray lets these variables win over the address that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            with self._explained():
                self._client = self._connected()
        except NoDashboard as error:
            raise BadInput(str(error)) from error

    def _connected(self) -> JobClient:
        try:
            return JobClient(self.address, verify=certificates(self.address))
        except AuthenticationError:
            # As `ray.init` does it for a cluster that runs, but only once a server has asked.
            if AUTH_MODE in os.environ or not maybe_enable_token_auth_if_token_available(False):
                raise
            return JobClient(self.address, verify=certificates(self.address))

    def is_this_machine(self) -> bool:
        """Whether all its nodes are here, and not behind a forwarded port."""
        with self._explained():
            nodes = StateClient(self.address).list(
                StateResource.NODES,
                ListApiOptions(filters=[("state", "=", "ALIVE")]),
                raise_on_missing_output=True,
            )
            return all(is_own_address(node.node_ip) for node in nodes)

    def submit(
        self,
        submission_id: str,
        entry_point: str,
        folder: Path,
        environment: dict[str, str],
        metadata: dict[str, str],
    ) -> None:
        """Sends a folder and starts the command in it, on the head.

        Raises:
            JobExists: there is a job of this id.
        """
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
            found = [_sound(job) for job in self._client.list_jobs()]
        ours = [job for job in found if job.submission_id and MARK in (job.metadata or {})]
        return sorted(ours, key=lambda job: job.start_time or 0)

    def job(self, submission_id: str) -> JobDetails:
        """One job, whoever submitted it.

        Raises:
            NoSuchJob: there is none.
        """
        with self._explained(submission_id):
            return _sound(self._client.get_job_info(quote(submission_id, safe="")))

    def stop(self, submission_id: str) -> None:
        """Has SIGTERM sent to the command, and SIGKILL after the time that was set with it."""
        with self._explained(submission_id):
            self._client.stop_job(quote(submission_id, safe=""))

    def log(self, submission_id: str) -> str:
        """What the command has written so far."""
        with self._explained(submission_id):
            told = self._client.get_job_logs(quote(submission_id, safe=""))
            if not isinstance(told, str):
                raise TypeError(f"a log of type {type(told).__name__}")
            return told

    async def tail(self, submission_id: str) -> AsyncIterator[str]:
        """What the command has written, and goes on to write, until it ends."""
        with self._explained(submission_id):
            async for piece in self._client.tail_job_logs(quote(submission_id, safe="")):
                yield piece

    @contextlib.contextmanager
    def _explained(self, submission_id: str = "") -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise BadInput(self._refused(str(error))) from error
        except requests.HTTPError as error:
            fails = error.response.status_code >= 500
            raise (
                ServerDown(f"{self.address} fails: {one_line(error)}")
                if fails
                else self._strange(error)
            ) from error
        except (requests.RequestException, RayStateApiException) as error:
            raise self._strange(error) from error
        except (aiohttp.ClientError, OSError) as error:
            raise explain(error, self.address) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # Ray's clients take an answer for what it should be.
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

    def _told(self, told: str, submission_id: str) -> BadInput | ServerDown:
        if "already exists" in told:
            return JobExists(f"{submission_id} exists already at {self.address}: submit once more")
        if "status code 404" in told and "does not exist" in told:
            return NoSuchJob(
                f"{self.address} has no job {submission_id}: `cat-ray status` lists them"
            )
        if "status code 400" in told:
            return BadInput(
                f"{self.address} refuses {submission_id or 'the request'}: {one_line(told)}"
            )
        return self._strange(told)

    def _strange(self, told: object) -> NoDashboard:
        return NoDashboard(
            f"{self.address} doesn't answer as the dashboard of Ray {ray.__version__} does: "
            f"{one_line(told)}"
        )


def _checked(address: str) -> str:
    """The address, without a slash at its end.

    Raises:
        BadInput: it is none, or holds credentials.
    """
    wrong = f"--address {address}: write it as http://HOST:8265"
    try:
        parts = urlsplit(address)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise BadInput(wrong) from error
    if "@" in parts.netloc:
        raise BadInput(
            "--address holds a user or password, which would be shown: set RAY_AUTH_TOKEN, or "
            "~/.netrc, instead"
        )
    plain = address.isprintable() and " " not in address and not parts.query + parts.fragment
    if parts.scheme not in ("http", "https") or not named or not plain:
        raise BadInput(wrong)
    return address.rstrip("/")


def _sound(job: JobDetails) -> JobDetails:
    """The same job, if its figures can be what they stand for.

    Raises:
        ValueError: they can't.
    """
    code = job.driver_exit_code or 0
    if not all(0 <= (time or 0) <= LATEST for time in (job.start_time, job.end_time)):
        raise ValueError("a job with a time that no calendar has")
    if not -255 <= code <= 255:
        raise ValueError(f"a job with the exit code {code}")
    return job


def ending_of(job: JobDetails) -> Ending | None:
    """How a job ended; None while it is to start, or runs."""
    if not job.status.is_terminal():
        return None
    if job.status == JobStatus.SUCCEEDED:
        return Ending(stopped=False, code=0)
    return Ending(
        stopped=job.status == JobStatus.STOPPED,
        # A failure is no 0, whatever is told of it.
        code=job.driver_exit_code or None,
        message=one_line(job.message) if job.message else "",
    )


def is_own_address(address: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
