"""What AWS, GCP and Azure tell, and that an endpoint that tells nothing right does no harm."""

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol
from urllib.error import URLError
from urllib.parse import parse_qs, urlsplit

import pytest

from cat_ray.training import cloud_notices
from cat_ray.training.cloud_notices import cloud_source
from cat_ray.training.preemption import Notice

Answer = tuple[int, str]
NOON = datetime(2026, 4, 11, 12, 0, 58, tzinfo=UTC)


class Cloud(Protocol):
    """What stands behind an endpoint: as documented, it refuses requests that aren't."""

    def answer(self, method: str, path: str, headers) -> Answer: ...

    def take_machine(self) -> None: ...


class Aws:
    def __init__(self):
        self.action: str | None = None
        self.nothing = 404
        self.token = ""
        self.tokens = 0

    def answer(self, method, path, headers):
        if (method, path) == ("PUT", "/latest/api/token"):
            if not 1 <= int(headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21600:
                return 400, "Bad Request"
            self.tokens += 1
            self.token = f"token-{self.tokens}=="
            return 200, self.token
        if headers.get("X-aws-ec2-metadata-token") != self.token:
            return 401, "Unauthorized"
        if (method, path) == ("GET", "/latest/meta-data/spot/instance-action") and self.action:
            return 200, self.action
        return self.nothing, "no action"

    def take_machine(self):
        self.action = json.dumps({"action": "terminate", "time": "2026-04-11T12:00:58Z"})


class Gcp:
    def __init__(self):
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}

    def answer(self, method, path, headers):
        if headers.get("Metadata-Flavor") != "Google":
            return 403, "Forbidden"
        name = path.removeprefix("/computeMetadata/v1/instance/")
        return (200, self.values[name]) if name in self.values else (404, "Not Found")

    def take_machine(self):
        self.values["preempted"] = "TRUE"


class Azure:
    def __init__(self):
        self.events: list[dict] = []

    def answer(self, method, path, headers):
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        if headers.get("Metadata") != "true":
            return 400, "Bad Request"
        if parts.path == "/metadata/scheduledevents" and query["api-version"] == ["2020-07-01"]:
            return 200, json.dumps({"DocumentIncarnation": 1, "Events": self.events})
        if parts.path == "/metadata/instance/compute/name" and query["format"] == ["text"]:
            return 200, "cats_1"
        return 404, "Not Found"

    def add(self, kind: str, not_before: str | None, machines: tuple[str, ...] = ("cats_1",)):
        event = {
            "EventId": f"event-{len(self.events)}",
            "EventType": kind,
            "ResourceType": "VirtualMachine",
            "Resources": list(machines),
            "EventStatus": "Scheduled" if not_before else "Started",
            "NotBefore": not_before,
            "Description": "",
            "EventSource": "Platform",
            "DurationInSeconds": -1,
        }
        self.events.append(event)

    def take_machine(self):
        self.add("Preempt", format_datetime(NOON, usegmt=True))


CLOUDS = {"aws": Aws, "gcp": Gcp, "azure": Azure}


class Endpoint:
    """A cloud on a port of this machine. `fault` replaces its answers by something else."""

    def __init__(self, cloud: Cloud):
        self.cloud = cloud
        self.fault: str | None = None
        self.over = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                endpoint.handle(self)

            def do_PUT(self):
                endpoint.handle(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        match self.fault:
            case None:
                # As it was sent: `request.path` has one slash where two began it.
                method, path, _ = request.requestline.split()
                status, text = self.cloud.answer(method, path, request.headers)
                send(request, status, text.encode())
            case "slow":
                self.over.wait(5)
            case "hung up":
                pass
            case "cut off":
                send(request, 200, b"TR", length=10)
            case "no HTTP":
                request.wfile.write(b"\x00\x01\r\n\r\n")
            case "no text":
                send(request, 200, b"\xff\xfe\xff")
            case "web page":
                send(request, 200, b"<html>\n<body>Sign in</body>\n</html>")
            case "empty":
                send(request, 200, b"")
            case "other JSON":
                send(request, 200, b'[{"Events": 3, "action": null}]')
            case status:
                send(request, int(status), b"{}")

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, length: int | None = None):
    request.send_response(status)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture
def endpoint(cloud_name: str) -> Iterator[Endpoint]:
    endpoint = Endpoint(CLOUDS[cloud_name]())
    yield endpoint
    endpoint.close()


def of(cloud_name: str):
    return pytest.mark.parametrize("cloud_name", [cloud_name])


every_cloud = pytest.mark.parametrize("cloud_name", list(CLOUDS))


# Every cloud.


@every_cloud
def test_a_machine_that_stays_has_no_notice_and_nothing_to_log(cloud_name, endpoint, caplog):
    source = cloud_source(cloud_name, endpoint.address)
    assert [source.poll() for _ in range(3)] == [None] * 3
    assert caplog.messages == []


@every_cloud
def test_a_notice_is_told_at_every_poll_and_does_not_move(cloud_name, endpoint):
    source = cloud_source(cloud_name, f"{endpoint.address}/")
    endpoint.cloud.take_machine()
    first = source.poll()
    assert first is not None
    assert [source.poll() for _ in range(3)] == [first] * 3


FAULTS = [
    *("403", "404", "429", "500", "503"),
    *("hung up", "cut off", "no HTTP", "no text", "web page", "empty", "other JSON"),
]


@every_cloud
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_is_no_notice_is_logged_and_leaves_no_trace(
    cloud_name, endpoint, fault, caplog
):
    source = cloud_source(cloud_name, endpoint.address)
    endpoint.fault = fault
    assert source.poll() is None
    [message] = caplog.messages
    assert endpoint.address in message
    assert "no preemption notices from" in message

    endpoint.fault = None
    endpoint.cloud.take_machine()
    assert source.poll() is not None


@every_cloud
def test_an_endpoint_that_is_slow_is_not_waited_for(cloud_name, endpoint, caplog, monkeypatch):
    assert cloud_notices.TIMEOUT_SECONDS <= 2
    monkeypatch.setattr(cloud_notices, "TIMEOUT_SECONDS", 0.1)
    endpoint.fault = "slow"
    started = time.monotonic()
    assert cloud_source(cloud_name, endpoint.address).poll() is None
    assert time.monotonic() - started < 1.5
    assert "timed out" in caplog.text


@every_cloud
def test_an_endpoint_that_is_not_there_is_no_notice(cloud_name, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        source = cloud_source(cloud_name, f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert source.poll() is None
    assert "refused" in caplog.text


@every_cloud
def test_failures_in_a_row_are_logged_once(cloud_name, endpoint, caplog):
    source = cloud_source(cloud_name, endpoint.address)
    endpoint.fault = "500"
    for _ in range(3):
        source.poll()
    assert len(caplog.messages) == 1
    endpoint.fault = None
    source.poll()
    endpoint.fault = "503"
    for _ in range(3):
        source.poll()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


@every_cloud
def test_a_proxy_in_the_environment_is_not_used(cloud_name, endpoint, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    endpoint.cloud.take_machine()
    assert cloud_source(cloud_name, endpoint.address).poll() is not None


@every_cloud
def test_a_mistake_of_ours_is_not_taken_for_a_silent_endpoint(cloud_name, monkeypatch):
    def breaks(*_, **__):
        raise KeyError("a mistake")

    source = cloud_source(cloud_name, "http://127.0.0.1:9")
    monkeypatch.setattr(source, "_ask", breaks)
    with pytest.raises(KeyError, match="a mistake"):
        source.poll()


@pytest.mark.parametrize(
    ("cloud_name", "host"),
    [
        ("aws", "169.254.169.254"),
        ("gcp", "metadata.google.internal"),
        ("azure", "169.254.169.254"),
    ],
)
def test_without_an_address_the_clouds_own_is_asked(cloud_name, host, monkeypatch):
    asked = []

    class Opener:
        def open(self, request, timeout):
            asked.append(urlsplit(request.full_url))
            raise URLError("not here")

    monkeypatch.setattr(cloud_notices, "build_opener", lambda *_: Opener())
    cloud_source(cloud_name, None).poll()
    assert [(parts.scheme, parts.netloc) for parts in asked] == [("http", host)]


# AWS.


@of("aws")
@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
@pytest.mark.parametrize("zone", ["Z", ""])
def test_aws_tells_what_happens_and_when(endpoint, action, zone, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        endpoint.cloud.action = f'{{"action": "{action}", "time": "2017-09-18T08:22:00{zone}"}}'
        notice = cloud_source("aws", endpoint.address).poll()
    finally:
        monkeypatch.undo()
        time.tzset()
    reason = f"AWS takes this machine (spot interruption: {action})"
    assert notice == Notice(reason, datetime(2017, 9, 18, 8, 22, tzinfo=UTC).timestamp())


@of("aws")
def test_an_aws_token_that_expires_between_polls_costs_no_notice(endpoint, caplog):
    source = cloud_source("aws", endpoint.address)
    assert source.poll() is None
    endpoint.cloud.token = "none is valid any more"
    endpoint.cloud.take_machine()
    assert source.poll() is not None
    assert caplog.messages == []


@of("aws")
@pytest.mark.parametrize("status", [403, 500, 503])
def test_only_an_aws_action_that_is_not_found_says_that_the_machine_stays(endpoint, status, caplog):
    endpoint.cloud.nothing = status
    assert cloud_source("aws", endpoint.address).poll() is None
    assert str(status) in caplog.text


@of("aws")
@pytest.mark.parametrize(
    "action",
    ['{"action": "stop"}', '{"action": "stop", "time": "soon"}', "null", '{"time": 3}'],
)
def test_an_aws_action_that_is_not_as_documented_is_logged(endpoint, action, caplog):
    endpoint.cloud.action = action
    assert cloud_source("aws", endpoint.address).poll() is None
    assert len(caplog.messages) == 1


# GCP.


@of("gcp")
@pytest.mark.parametrize(
    ("preempted", "maintenance", "reason", "seconds"),
    [
        ("TRUE", "NONE", "GCP takes this machine (preemption)", 30),
        ("TRUE", "TERMINATE_ON_HOST_MAINTENANCE", "GCP takes this machine (preemption)", 30),
        (
            "FALSE",
            "TERMINATE_ON_HOST_MAINTENANCE",
            "GCP takes this machine (host maintenance)",
            60,
        ),
    ],
)
def test_gcp_gives_so_many_seconds_from_now(endpoint, preempted, maintenance, reason, seconds):
    endpoint.cloud.values = {"preempted": preempted, "maintenance-event": maintenance}
    before = time.time()
    notice = cloud_source("gcp", endpoint.address).poll()
    assert notice.reason == reason
    assert before + seconds <= notice.deadline <= time.time() + seconds


@of("gcp")
def test_a_gcp_machine_that_migrates_stays(endpoint, caplog):
    endpoint.cloud.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert cloud_source("gcp", endpoint.address).poll() is None
    assert caplog.messages == []


@of("gcp")
def test_a_gcp_preemption_during_maintenance_is_a_notice_of_its_own(endpoint):
    source = cloud_source("gcp", endpoint.address)
    endpoint.cloud.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    maintenance = source.poll()
    endpoint.cloud.values["preempted"] = "TRUE"
    preemption = source.poll()
    assert preemption.reason != maintenance.reason
    assert preemption.deadline < maintenance.deadline


@of("gcp")
def test_a_gcp_notice_that_was_withdrawn_gives_its_seconds_anew(endpoint):
    source = cloud_source("gcp", endpoint.address)
    endpoint.cloud.values["preempted"] = "TRUE"
    first = source.poll()
    endpoint.cloud.values["preempted"] = "FALSE"
    assert source.poll() is None
    endpoint.cloud.values["preempted"] = "TRUE"
    assert source.poll().deadline > first.deadline


# Azure.


@of("azure")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Preempt", "Azure takes this machine (spot eviction)"),
        ("Terminate", "Azure takes this machine (deletion)"),
    ],
)
def test_azure_tells_what_happens_and_when(endpoint, kind, reason):
    endpoint.cloud.add(kind, "Sat, 11 Apr 2026 12:00:58 GMT", ("cats_0", "cats_1"))
    notice = cloud_source("azure", endpoint.address).poll()
    assert notice == Notice(reason, NOON.timestamp())


@of("azure")
@pytest.mark.parametrize(
    ("kind", "machines"),
    [
        ("Preempt", ("cats_0",)),
        ("Terminate", ("cats_10", "cats_11")),
        ("Freeze", ("cats_1",)),
        ("Reboot", ("cats_1",)),
        ("Redeploy", ("cats_1",)),
    ],
)
def test_azure_events_that_take_other_machines_or_none_are_no_notice(
    endpoint, kind, machines, caplog
):
    endpoint.cloud.add(kind, "Sat, 11 Apr 2026 12:00:58 GMT", machines)
    assert cloud_source("azure", endpoint.address).poll() is None
    assert caplog.messages == []


@of("azure")
def test_of_several_azure_events_the_earliest_of_this_machine_counts(endpoint):
    endpoint.cloud.add("Preempt", "Sat, 11 Apr 2026 11:00:00 GMT", ("cats_0",))
    endpoint.cloud.add("Terminate", "Sat, 11 Apr 2026 13:00:00 GMT")
    endpoint.cloud.add("Preempt", "Sat, 11 Apr 2026 12:00:58 GMT")
    endpoint.cloud.add("Terminate", "Sun, 12 Apr 2026 12:00:58 GMT")
    assert cloud_source("azure", endpoint.address).poll().deadline == NOON.timestamp()


@of("azure")
def test_an_azure_event_that_has_begun_leaves_no_time(endpoint):
    endpoint.cloud.add("Preempt", "")
    before = time.time()
    notice = cloud_source("azure", endpoint.address).poll()
    assert before <= notice.deadline <= time.time()


@of("azure")
@pytest.mark.parametrize("not_before", [None, "soon", 3])
def test_an_azure_time_that_is_not_as_documented_is_logged(endpoint, not_before, caplog):
    endpoint.cloud.add("Preempt", not_before)
    assert cloud_source("azure", endpoint.address).poll() is None
    assert len(caplog.messages) == 1
