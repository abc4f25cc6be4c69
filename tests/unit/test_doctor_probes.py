"""What `cat-ray doctor` tries out leaves nothing behind; which step failed; its exit codes."""

import json
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cat_ray.cli import app
from cat_ray.config import parse
from cat_ray.data.index import INDEX_NAME
from cat_ray.doctor import examine
from cat_ray.doctor.facts import Facts, Needs, Node
from cat_ray.doctor.links import Listener, links_to, port_range
from cat_ray.doctor.needs import needs_of
from cat_ray.doctor.node import facts_here
from cat_ray.doctor.storage_probe import PROBE_BYTES, cleared, take_away, try_reading, try_writing
from cat_ray.model.build import build_generator
from cat_ray.storage import Location, locate

PROBE, MARK = ".probe-0", ".probe"


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    """A folder with something in it, and the driver's mark."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / MARK).write_text("mark")
    return locate(str(tmp_path))


# Storage.


def test_a_trial_measures_and_leaves_what_was_there(folder, tmp_path):
    trial = try_writing("a node", folder, PROBE, MARK)
    assert (trial.refused, trial.reason) == ("", "")
    assert trial.write_rate > 0 and trial.read_rate > 0 and trial.list_seconds > 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "mine": "precious",
        MARK: "mark",
    }


def test_a_disk_where_the_drivers_mark_is_not_seen_is_not_shared(folder, tmp_path):
    trial = try_writing("a node", folder, PROBE, ".mark-elsewhere")
    assert trial.refused == "see"
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "mine"]


def test_where_nothing_can_be_written_the_step_and_the_reason_are_told(folder, tmp_path):
    # Root may write to any folder, but not below a file.
    trial = try_writing("a node", folder / "mine", PROBE, MARK)
    assert trial.refused == "write"
    assert f"{tmp_path}/mine" in trial.reason
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_half_written_probe_is_taken_away(folder, tmp_path):
    (tmp_path / f".{PROBE}.partial").write_bytes(b"half")
    assert take_away(folder / PROBE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARK, "mine"]


@pytest.mark.parametrize("meanwhile", [False, True])
def test_folders_that_the_probing_made_are_taken_away_unless_somebody_uses_them(
    folder, tmp_path, meanwhile
):
    left_behind: list[str] = []
    with cleared(folder / "a" / "b", left_behind):
        (folder / "a" / "b" / PROBE).write(b"x")
        assert take_away(folder / "a" / "b" / PROBE)
        if meanwhile:
            (folder / "a" / "other").write(b"of another run")
    assert left_behind == []
    assert (tmp_path / "a").exists() == meanwhile
    assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "mine").read_text() == "precious"


def test_shards_are_only_read(folder, tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(bytes(PROBE_BYTES + 1))
    assert try_reading("a node", folder).reason == f"there is no {INDEX_NAME}"
    (tmp_path / INDEX_NAME).write_text("{}")
    trial = try_reading("a node", folder)
    assert (trial.refused, trial.write_rate) == ("", None)
    assert trial.read_rate > 0


# Ports, the node itself, and what a job needs.


def test_open_closed_and_strange_ports_are_told_apart():
    listener = Listener()
    first, last = port_range()
    assert all(first <= port <= last for port in listener.ports)
    closed = socket.create_server(("127.0.0.1", 0))
    closed_port = closed.getsockname()[1]
    closed.close()
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        socket.create_server(("127.0.0.1", 0)) as strange,
    ):
        silent_port, strange_port = (each.getsockname()[1] for each in (silent, strange))
        threading.Thread(target=lambda: strange.accept()[0].sendall(b"HTTP/1.1 400")).start()
        ports = (*listener.ports, closed_port, silent_port, strange_port)
        (link,) = links_to("a", [("b", "127.0.0.1", ports)], seconds=2)
    assert (link.source, link.target, link.ports) == ("a", "b", ports)
    assert link.blocked == {
        closed_port: "Connection refused",
        silent_port: "timed out",
        strange_port: "something else answers",
    }
    listener.close()


def test_a_node_names_its_tools_as_deepspeed_looks_for_them(tmp_path, monkeypatch):
    compiler = tmp_path / "my-compiler"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = facts_here(str(tmp_path / "not" / "yet"), str(tmp_path))
    assert (found.ninja, found.compiler) == (None, None)
    monkeypatch.setenv("CXX", "my-compiler")
    assert facts_here(str(tmp_path), str(tmp_path)).compiler == str(compiler)
    assert found.staging.free_bytes > 0
    assert found.versions["deepspeed"] == "0.19.8"


def test_a_job_needs_room_for_its_checkpoint_and_its_windows(tiny_job):
    config = parse(tiny_job, "job.yaml", ["optimisation.ema_decays=[0.9]", "workers.minimum=1"])
    one, two = (
        needs_of(parse(tiny_job, "job.yaml", [f"optimisation.ema_decays={decays}"]))
        for decays in ("[0.9]", "[0.9, 0.5]")
    )
    parameters = sum(each.numel() for each in build_generator(config).parameters())
    assert two.checkpoint_bytes - one.checkpoint_bytes == 4 * parameters
    assert one.window_bytes == 3 * config.data.window_megabytes * 10**6
    node = Node("a", cpus=0.5, gpus=0.0, object_store_bytes=1, facts=None)
    # Two workers of half a CPU: one fits, and has half of a checkpoint.
    assert one.workers_on(node) == 1
    assert one.staging_bytes_on(node) == one.checkpoint_bytes // 2
    assert needs_of(config).staging_bytes_on(node) == needs_of(config).checkpoint_bytes
    assert replace(one, gpu=True).workers_on(node) == 0


# The command.


def silent(*_: object) -> Facts:
    node = Node("a", 1.0, 0.0, 1, None, silence="nothing came in 120 s")
    return Facts({}, Needs(gpu=False), (node,), (), None, ())


def test_a_failure_is_exit_code_1_and_readable_by_scripts(monkeypatch):
    monkeypatch.setattr(examine, "examine", silent)
    ended = CliRunner().invoke(app, ["doctor", "--json"])
    assert (ended.exit_code, ended.stderr) == (1, "")
    content = json.loads(ended.stdout)
    assert (content["passed"], content["findings"][0]["check"]) == (False, "nodes")
    ended = CliRunner().invoke(app, ["doctor"])
    assert ended.exit_code == 1
    assert "nothing came in 120 s" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "run.seed=1"], "--set changes a job: name one"),
        (["absent.yaml"], "can't read the job file absent.yaml"),
        (["--storage", "ftp://host/key"], "ftp://host/key: use a local path"),
        (["--storage", "s3://b/k", "--endpoint-url", "minio"], "begin it with http://"),
        ([], "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, told, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    ended = CliRunner().invoke(app, ["doctor", *arguments])
    assert (ended.exit_code, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert told in line
