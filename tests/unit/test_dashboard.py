"""A dashboard as Ray's, as far as it is asked: it goes away and comes back, and tells anything."""

import asyncio
import io
import itertools
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from cat_ray.cli import app
from cat_ray.submission import ending, follow, patience, transport
from cat_ray.submission.package import code_files, fill
from cat_ray.submission.server import JobServer

HANG_SECONDS = 60.0


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test can wait for."""
    # The client sets it, so that no other address wins over the one that was given.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setattr(transport, "REQUEST_SECONDS", 5.0)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(follow, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(ending, "FIRST_PAUSE_SECONDS", 0.1)


def call(*arguments: str) -> Result:
    """A command; it must not hang, nor tell anything but lines of ours."""
    began = time.monotonic()
    result = CliRunner().invoke(app, arguments)
    assert time.monotonic() - began < HANG_SECONDS
    assert "unexpected" not in result.stderr and "\x1b" not in result.output
    return result


@dataclass
class Dashboard:
    """Jobs that run until they are told how they end; it can go away and come back."""

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    # What to do with the requests to come, one after the other.
    faults: Iterator[Callable[[web.Request], web.StreamResponse | None]] = field(
        default_factory=lambda: iter(())
    )
    submitted: list[str] = field(default_factory=list)
    forgets_answer: bool = False
    silent: bool = False
    on_submit: Callable[["Dashboard", str], None] = lambda dashboard, name: None
    port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, status: str = "RUNNING", **values: Any) -> None:
        self.jobs[name] = {
            "type": "SUBMISSION",
            "submission_id": name,
            "entrypoint": "x",
            "status": status,
            "start_time": 1_795_800_000_000,
            "metadata": {"cat_ray": "1", "folder": f"/runs/{name}"},
        } | values

    def end(self, name: str, status: str = "SUCCEEDED", **values: Any) -> None:
        self.jobs[name] |= {"status": status, **values}

    def start(self) -> None:
        begun = threading.Event()

        async def run() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            application = web.Application(middlewares=[self._middleware()], client_max_size=2**27)
            application.router.add_route("*", "/{path:.*}", self._answer)
            runner = web.AppRunner(application, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]
            begun.set()
            await self._stop.wait()
            await runner.cleanup()

        self._thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        self._thread.start()
        assert begun.wait(HANG_SECONDS)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(HANG_SECONDS)

    def _middleware(self) -> Any:
        @web.middleware
        async def misbehave(request: web.Request, handler: Any) -> web.StreamResponse:
            fault = next(self.faults, None)
            answer = fault(request) if fault else None
            return answer if answer is not None else await handler(request)

        return misbehave

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path in self.answers:
            return web.json_response(self.answers[path])
        if path == "/api/version":
            return web.json_response({"ray_version": "2.60.0"})
        if path == "/api/v0/nodes":
            nodes = {"result": [], "total": 0, "num_after_truncation": 0, "num_filtered": 0}
            return web.json_response({"result": True, "msg": "", "data": {"result": nodes}})
        if path.startswith("/api/packages/"):
            name = path.rsplit("/", 1)[-1]
            if request.method == "PUT":
                self.packages[name] = await request.read()
            return web.Response(status=200 if name in self.packages else 404)
        if path == "/api/jobs/" and request.method == "POST":
            return self._submit(await request.json())
        if path == "/api/jobs/":
            return web.json_response(list(self.jobs.values()))
        name, *rest = path.removeprefix("/api/jobs/").split("/")
        if name not in self.jobs:
            return web.Response(status=404, text=f"Job {name} does not exist")
        if rest == ["stop"]:
            self.end(name, "STOPPED")
            return web.json_response({"stopped": True})
        if rest == ["logs"]:
            return web.json_response({"logs": self.logs.get(name, "")})
        if rest == ["logs", "tail"]:
            return await self._tail(request, name)
        return web.json_response(self.jobs[name])

    def _submit(self, job: dict[str, Any]) -> web.StreamResponse:
        name = job["submission_id"]
        if name in self.jobs:
            return web.Response(status=500, text=f"Job with submission_id {name} already exists.")
        self.submitted.append(name)
        self.add(name, metadata=job["metadata"])
        self.on_submit(self, name)
        if self.forgets_answer:
            self.forgets_answer = False
            return web.Response(status=502)
        return web.json_response({"job_id": name, "submission_id": name})

    async def _tail(self, request: web.Request, name: str) -> web.StreamResponse:
        stream = web.WebSocketResponse()
        await stream.prepare(request)
        shown = 0
        while not stream.closed:
            ended = self.jobs[name]["status"] != "RUNNING"
            if self.silent:
                await asyncio.sleep(0.02)
            elif new := self.logs.get(name, "")[shown:]:
                await stream.send_str(new)
                shown += len(new)
            elif ended:
                break
            await asyncio.sleep(0.02)
        return stream


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    started = Dashboard()
    started.start()
    yield started
    started.stop()


def wait(seconds: float = 0.7) -> None:
    time.sleep(seconds)


def status(code: int) -> Callable[[web.Request], web.StreamResponse]:
    return lambda request: web.Response(status=code, text="<html>away</html>")


def test_what_works_works(dashboard: Dashboard):
    dashboard.add("a-1", "SUCCEEDED", end_time=1_795_800_060_000)
    dashboard.logs["a-1"] = "320 images 100%\n"
    listed = call("status", "--address", dashboard.address)
    assert listed.exit_code == 0 and "a-1" in listed.stdout and "finished" in listed.stdout
    assert "320 images" in call("status", "a-1", "--address", dashboard.address).stdout
    followed = call("status", "a-1", "--follow", "--address", dashboard.address)
    assert (followed.exit_code, followed.stdout) == (0, "320 images 100%\n")
    unknown = call("status", "b-1", "--address", dashboard.address)
    assert unknown.exit_code == 2 and "has no job b-1" in unknown.stderr


@pytest.mark.parametrize("code", [500, 502, 503, 504, 404])
@pytest.mark.parametrize("command", ["status", "stop", "submit"])
def test_a_server_that_goes_away_between_two_requests_is_exit_code_75(
    dashboard: Dashboard, job_file: Path, command: str, code: int
):
    # The first two ask for its version.
    dashboard.faults = itertools.chain([lambda request: None] * 2, itertools.repeat(status(code)))
    arguments = {"status": [], "stop": ["a-1"], "submit": [str(job_file)]}[command]
    result = call(command, *arguments, "--address", dashboard.address)
    assert (result.exit_code, result.stdout) == (75, ""), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_the_server_refuses_is_exit_code_2(dashboard: Dashboard):
    dashboard.faults = iter([lambda request: None] * 2 + [status(400)])
    result = call("status", "a-1", "--address", dashboard.address)
    assert result.exit_code == 2
    assert "refuses a-1: " in result.stderr


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(["\x1b[2J", "\ud800", "FAILED", "a\nb", "[red]", "2026"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values),
    max_leaves=6,
)
KEYS = [
    *("type", "status", "submission_id", "entrypoint", "message", "start_time", "end_time"),
    *("metadata", "driver_exit_code", "driver_info", "runtime_env", "error_type"),
]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3)
    | st.fixed_dictionaries(
        {
            "metadata": st.dictionaries(st.text(max_size=9), st.text(max_size=9)).map(
                lambda values: values | {"cat_ray": "1", "folder": "\x1b]0;x\x07\ud800"}
            ),
            "message": st.text(),
            "status": st.sampled_from(["FAILED", "STOPPED", "RUNNING", "PENDING", "SUCCEEDED"]),
            "driver_exit_code": st.none() | st.integers(-300, 300),
        }
    ),
    whole=st.none() | json_values,
    log=json_values,
    arguments=st.sampled_from(([], ["--json"], ["a-1"])),
)
@example(changes={"start_time": 10**20}, whole=None, log="", arguments=[])
@example(changes={"driver_exit_code": 10**9}, whole=None, log="", arguments=["a-1"])
@example(changes={}, whole=None, log=None, arguments=["a-1"])
@example(changes={}, whole=None, log="\x1b]52;c;x\x07\n" * 9, arguments=["a-1"])
@example(changes={"submission_id": "\x1b[31m\nx"}, whole=None, log="", arguments=[])
def test_whatever_a_server_tells_of_a_job_nothing_else_is_shown_or_raised(
    dashboard: Dashboard, changes: dict[str, Any], whole: Any, log: Any, arguments: list[str]
):
    dashboard.add("a-1")
    job = dashboard.jobs["a-1"] | changes if whole is None else whole
    dashboard.answers = {
        "/api/jobs/": [job],
        "/api/jobs/a-1": job,
        "/api/jobs/a-1/logs": {"logs": log},
    }
    result = call("status", *arguments, "--address", dashboard.address)
    assert result.exit_code in (0, 75)
    assert len(result.stderr.splitlines()) == (0 if result.exit_code == 0 else 1)


# Following one that goes away.


def ways_to_be_away() -> dict[str, Callable[[Dashboard], None]]:
    def stopped(dashboard: Dashboard) -> None:
        dashboard.stop()
        wait()
        dashboard.start()

    def failing(code: int) -> Callable[[Dashboard], None]:
        def fail(dashboard: Dashboard) -> None:
            dashboard.faults = itertools.repeat(status(code))
            dashboard._loop.call_soon_threadsafe(lambda: None)
            wait()
            dashboard.faults = iter(())

        return fail

    return {"refused": stopped, **{str(code): failing(code) for code in (404, 500, 502, 503, 504)}}


@pytest.mark.parametrize("way", ways_to_be_away())
def test_a_dashboard_that_is_away_for_a_moment_does_not_end_the_retries(
    dashboard: Dashboard, job_file: Path, way: str
):
    go_away = ways_to_be_away()[way]

    def first_is_killed(dashboard: Dashboard, name: str) -> None:
        dashboard.logs[name] = f"{name} begins\n"
        if name.endswith("-1"):
            threading.Thread(target=trouble, args=(name,), daemon=True).start()
        else:
            dashboard.logs[name] += "the end\n"
            dashboard.end(name)

    def trouble(name: str) -> None:
        wait(0.3)
        go_away(dashboard)
        dashboard.logs[name] += "and dies\n"
        dashboard.end(name, "FAILED", driver_exit_code=-9)

    dashboard.on_submit = first_is_killed
    submit = ("submit", str(job_file), "--follow", "--retries", "1")
    result = call(*submit, "--address", dashboard.address)
    assert result.exit_code == 0, result.stderr
    assert [name[-2:] for name in dashboard.submitted] == ["-1", "-2"]
    first, second = dashboard.submitted
    assert result.stdout == f"{first} begins\nand dies\n{second} begins\nthe end\n"
    assert "retry 1 of 1" in result.stderr
    if way == "refused":
        assert "asking again for another 30 min" in result.stderr
        assert "answers again" in result.stderr


def test_a_retry_whose_answer_is_lost_is_found_again_and_not_started_twice(
    dashboard: Dashboard, job_file: Path
):
    def attempt(dashboard: Dashboard, name: str) -> None:
        if name.endswith("-1"):
            dashboard.end(name, "FAILED", driver_exit_code=75)
            dashboard.forgets_answer = False
        else:
            dashboard.forgets_answer = True
            dashboard.logs[name] = "the end\n"
            threading.Timer(0.3, lambda: dashboard.end(name)).start()

    dashboard.on_submit = attempt
    submit = ("submit", str(job_file), "--follow", "--retries", "3")
    result = call(*submit, "--address", dashboard.address)
    assert (result.exit_code, result.stdout) == (0, "the end\n"), result.stderr
    assert len(dashboard.submitted) == 2


def test_a_log_that_falls_silent_without_a_word_is_shown_whole_at_the_end(dashboard: Dashboard):
    dashboard.add("a-1")
    dashboard.logs["a-1"] = "begins\nends\n"
    dashboard.silent = True
    threading.Timer(0.3, dashboard.end, ("a-1",)).start()
    result = call("status", "a-1", "--follow", "--address", dashboard.address)
    assert (result.exit_code, result.stdout) == (0, "begins\nends\n")


def test_a_head_that_has_forgotten_the_job_is_sent_it_again(dashboard: Dashboard, job_file: Path):
    def attempt(dashboard: Dashboard, name: str) -> None:
        if len(dashboard.submitted) == 1:
            threading.Timer(0.3, dashboard.jobs.clear).start()
        else:
            dashboard.end(name)

    dashboard.on_submit = attempt
    submit = ("submit", str(job_file), "--follow", "--retries", "1")
    result = call(*submit, "--address", dashboard.address)
    assert result.exit_code == 0, result.stderr
    assert "ended: lost (the cluster forgot it); retry 1 of 1" in result.stderr


def test_a_submission_whose_answer_is_lost_says_that_it_may_have_started(
    dashboard: Dashboard, job_file: Path
):
    dashboard.forgets_answer = True
    result = call("submit", str(job_file), "--address", dashboard.address)
    assert (result.exit_code, result.stdout) == (75, "")
    assert f"{dashboard.submitted[0]} may have started: `cat-ray status` lists it" in result.stderr


def test_a_server_that_never_comes_back_is_exit_code_75(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.5)
    dashboard.add("a-1")
    # Its version twice, the job, its log; then what looks whether a silent log is one of the dead.
    dashboard.faults = itertools.chain([lambda request: None] * 4, itertools.repeat(status(503)))
    result = call("status", "a-1", "--follow", "--address", dashboard.address)
    assert result.exit_code == 75
    assert "a-1 may run on: follow it with `cat-ray status a-1 --follow" in result.stderr


def test_a_stop_waits_for_a_server_that_is_away_for_a_moment(dashboard: Dashboard):
    dashboard.add("a-1")
    passing = [lambda request: None] * 4
    dashboard.faults = iter([*passing, status(502), status(503)])
    result = call("stop", "a-1", "--address", dashboard.address)
    assert (result.exit_code, result.stdout) == (0, "a-1 ended: stopped\n")


def test_colours_of_a_log_stay_and_what_else_a_terminal_obeys_is_shown(dashboard: Dashboard):
    dashboard.add("a-1", "SUCCEEDED")
    dashboard.logs["a-1"] = "\x1b[36m(pid)\x1b[0m 5%\r9%\n\x1b]0;title\x07\x1b[2J\u202e\x9b\n"
    result = CliRunner().invoke(app, ["status", "a-1", "--follow", "--address", dashboard.address])
    assert result.stdout == (
        "\x1b[36m(pid)\x1b[0m 5%\r9%\n\\x1b]0;title\\x07\\x1b[2J\\x202e\\x9b\n"
    )


# What is sent.


def test_of_a_package_folder_only_its_code_and_named_data_are_sent(
    dashboard: Dashboard, tmp_path: Path
):
    package = tmp_path / "cat_ray"
    sent = ("__init__.py", "__main__.py", "data/__init__.py", "data/tar.py")
    sent += ("operations/__init__.py", "operations/gpus.yaml")
    planted = (
        *("service-account.json", "data/service-account.json", "gpus.yaml", "data/gpus.yaml"),
        *(".env", ".aws/credentials", ".aws/__init__.py", ".netrc.py", ".ipynb_checkpoints/a.py"),
        *("data/table.csv", "data/key.pem", "a.safetensors", "data/tar.py~", "data/py", "notes.md"),
        *("__pycache__/a.py", "__pycache__/__init__.py", "data/__pycache__/tar.cpython-311.pyc"),
        *("scratch/mine.py", "operations/gpus.yaml.bak", "pyproject.toml", "py.typed"),
    )
    for name in (*sent, *planted):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(f"# {name}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("__init__.py", "secret.py"):
        (elsewhere / name).write_text("hush")
    (package / "passwd").symlink_to("/etc/passwd")
    (package / "passwd.py").symlink_to("/etc/passwd")
    (package / "data/inside.py").symlink_to(package / "data/tar.py")
    (package / "linked").symlink_to(elsewhere)
    (package / "around").symlink_to(package)
    os.mkfifo(package / "pipe.py")

    (tmp_path / "sent").mkdir()
    fill(tmp_path / "sent", "run: {}\n", code_files(package))
    JobServer(dashboard.address).submit("a-1", "true", tmp_path / "sent", {}, {})
    (content,) = dashboard.packages.values()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {info.filename for info in archive.infolist() if not info.is_dir()}
        assert files == {"job.yaml", *(f"cat_ray/{name}" for name in sent)}
        assert not any(b"hush" in archive.read(name) for name in files)
        assert not any(info.external_attr >> 28 == 0o12 for info in archive.infolist())
