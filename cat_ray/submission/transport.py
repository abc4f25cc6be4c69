"""One request to a cluster's dashboard, with limits to its time and to the size of its answer."""

import asyncio
import io
import os
import re
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray._private.authentication.http_token_authentication import format_authentication_http_error
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state.api import StateApiClient
from yarl import URL

from cat_ray.errors import BadInput, ExpectedError, last_line, printable

CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 30.0
# A package that is sent and a log that is read may take longer, at this rate.
SLOWEST_BYTES_PER_SECOND = 256 * 1024
ANSWER_BYTES = 64 * 2**20
LOG_BYTES = 256 * 2**20
PIECE_BYTES = 2**16
PASSING_STATUS = frozenset({408, 429, 502, 503, 504})
MOVED_STATUS = frozenset({301, 302, 303, 307, 308})
LINE_CHARACTERS = 300


class ServerDown(ExpectedError):
    """The job server doesn't answer, or not as it should: a later try may succeed."""

    exit_code = 75


class NoDashboard(ServerDown):
    """Nobody listens at the address, or something that is no dashboard of Ray.

    Where the server was never reached before it is the address that is wrong.
    """


class Limited:
    """What Ray's clients ask, carried within our limits: a base class before theirs.

    Ray's own transport waits for ever, follows redirects and reads whatever is sent.
    """

    _address: str
    _headers: dict[str, Any]
    _cookies: dict[str, Any] | None

    def _do_request(
        self,
        method: str,
        endpoint: str,
        *,
        data: bytes | None = None,
        json_data: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> requests.Response:
        sent = requests.Request(
            method,
            self._address + endpoint,
            headers=self._headers,
            cookies=self._cookies,
            params=params,
            data=data,
            json=json_data,
        ).prepare()
        with_log = endpoint.endswith("/logs")
        try:
            answer = asyncio.run(_ask(sent, LOG_BYTES if with_log else ANSWER_BYTES, with_log))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise explain(error, self._address) from error
        _check_status(answer, self._address)
        return answer


class JobClient(Limited, JobSubmissionClient):
    """Ray's client for jobs."""


class StateClient(Limited, StateApiClient):
    """Ray's client for the cluster's state."""


def certificates(address: str) -> str | bool:
    """The file or folder of trusted certificates for an address, as `requests` finds it.

    Raises:
        BadInput: there is none.
    """
    if urlsplit(address).scheme != "https":
        return True
    named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    found = named or requests.certs.where()
    if not Path(found).exists():
        raise BadInput(f"REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names {found}, which doesn't exist")
    return found


def explain(error: Exception, address: str) -> ServerDown:
    """The exception of ours that says what a failed request means."""
    if isinstance(error, aiohttp.ClientSSLError):
        return NoDashboard(
            f"no TLS connection to {address}: {one_line(error)}; write http:// if it has no TLS, "
            "or name its certificate authority's file in REQUESTS_CA_BUNDLE"
        )
    if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        return NoDashboard(
            f"nobody answers at {address}: is it the address of the cluster's dashboard, "
            "with its port (8265), and reachable from here?"
        )
    if isinstance(error, TimeoutError):
        return ServerDown(
            f"{address} didn't answer a request within {REQUEST_SECONDS:.0f} s: try again, or look "
            "into the dashboard's log on the head"
        )
    if isinstance(error, (aiohttp.ClientResponseError, ValueError)):
        return NoDashboard(f"{address} is no dashboard of Ray: {one_line(error)}")
    return ServerDown(f"the connection to {address} broke ({one_line(error)}): try again")


def one_line(told: object) -> str:
    """The last line of what was told, its blanks made one, cut where it is long."""
    line = printable(re.sub(r"\s+", " ", last_line(told)))
    return line if len(line) <= LINE_CHARACTERS else f"{line[:LINE_CHARACTERS]}..."


async def _ask(sent: requests.PreparedRequest, most: int, more_time: bool) -> requests.Response:
    """The answer, whole."""
    body = bytearray()
    seconds = REQUEST_SECONDS + len(sent.body or b"") / SLOWEST_BYTES_PER_SECOND
    connecting = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    async with (
        asyncio.timeout(seconds) as limit,
        aiohttp.ClientSession(trust_env=True, timeout=connecting) as session,
        session.request(
            str(sent.method),
            URL(str(sent.url), encoded=True),
            data=sent.body,
            headers=sent.headers,
            allow_redirects=False,
            ssl=_tls(str(sent.url)),
        ) as answer,
    ):
        async for piece in answer.content.iter_chunked(PIECE_BYTES):
            body += piece
            if len(body) > most:
                raise ValueError(f"it answers with more than {most // 2**20} MiB")
            if more_time:
                limit.reschedule((limit.when() or 0) + len(piece) / SLOWEST_BYTES_PER_SECOND)
    whole = requests.Response()
    whole.status_code, whole.reason, whole.url = answer.status, answer.reason or "", str(sent.url)
    whole.headers.update(answer.headers)
    whole.encoding = "utf-8"
    whole.raw = io.BytesIO(body)
    return whole


def _tls(url: str) -> ssl.SSLContext | bool:
    verified = certificates(url)
    if isinstance(verified, bool):
        return verified
    place = "capath" if Path(verified).is_dir() else "cafile"
    return ssl.create_default_context(**{place: verified})


def _check_status(answer: requests.Response, address: str) -> None:
    """Looks for what doesn't come from a dashboard, but from what stands before it.

    Raises:
        ServerDown: it is away.
        NoDashboard: it has moved.
        AuthenticationError: it wants another token, or one at all.
    """
    status = answer.status_code
    if status in PASSING_STATUS:
        raise ServerDown(f"{address} answers {status} {one_line(answer.reason)}: try again later")
    if status in MOVED_STATUS:
        place = one_line(answer.headers.get("Location", "nowhere"))
        raise NoDashboard(f"{address} redirects to {place}: give the dashboard's own address")
    refused = format_authentication_http_error(status, answer.text[:LINE_CHARACTERS])
    if refused:
        raise AuthenticationError(refused)
