"""What is sent to a cluster, under which name, and which ends are tried again."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cat_ray.cli import app
from cat_ray.config import dump, parse
from cat_ray.errors import BadInput
from cat_ray.operations.outcome import checkpoint_told, stopped_with
from cat_ray.storage import locate
from cat_ray.submission.ending import Ending, goes_on, pause_seconds
from cat_ray.submission.job import (
    KINDS,
    code_commit,
    command_of,
    entry_point,
    metadata,
    next_attempt,
    read_submission,
)
from cat_ray.submission.package import DATA, LIMIT_BYTES, check_size, code_files, fill
from cat_ray.submission.server import is_own_address

JOBS = {
    "quickstart.yaml": "train",
    "fid.yaml": "fid",
    "fid50k.yaml": "fid",
    "sample.yaml": "sample",
    "prepare_imagenet.yaml": "prepare",
}
FOLDER = Path(__file__).parents[2] / "jobs"
SHA256 = "features.sha256=" + 64 * "a"


def overrides_of(name: str) -> list[str]:
    return [SHA256, "features.weights=/weights/inception.safetensors"] if "50k" in name else []


# Jobs and names.


@pytest.mark.parametrize(("name", "command"), JOBS.items())
def test_what_a_job_is_of_its_sections_tell_and_it_travels_resolved(name: str, command: str):
    submission = read_submission(str(FOLDER / name), overrides_of(name), None)
    assert submission.command == command
    assert submission.name == name.removesuffix(".yaml")
    again = parse(submission.text, "job.yaml", (), KINDS[command])
    assert dump(again) == submission.text


def test_what_is_nobodys_is_refused_as_a_job_of_training(tmp_path: Path):
    assert command_of({"sections": 1}) == command_of("text") == "train"
    (tmp_path / "job.yaml").write_text("samples: {checkpoint: a}\noutput: {foldr: b}\n")
    with pytest.raises(BadInput, match=r"output.foldr, did you mean output.folder"):
        read_submission(str(tmp_path / "job.yaml"), (), None)


def test_overrides_are_part_of_what_travels_and_of_its_id(job_file: Path):
    plain = read_submission(str(job_file), (), None)
    other = read_submission(str(job_file), ("run.seed=7",), None)
    assert yaml.safe_load(other.text)["run"]["seed"] == 7
    assert plain.id_prefix != other.id_prefix
    assert plain.id_prefix == f"job-{plain.digest[:8]}-"


@pytest.mark.parametrize(
    ("asked", "name"), [("seed 7 / long", "seed-7-long"), ("a.b_c-d", "a.b_c-d"), ("/x/", "x")]
)
def test_an_id_has_no_character_that_an_address_has_not(job_file: Path, asked: str, name: str):
    assert read_submission(str(job_file), (), asked).name == name


@pytest.mark.parametrize("asked", ["", "///", " "])
def test_a_name_without_letters_is_refused(job_file: Path, asked: str):
    with pytest.raises(BadInput, match="use letters and digits"):
        read_submission(str(job_file), (), asked)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], 1),
        (["a-1f-1", "a-1f-2", "a-1f-10"], 11),
        (["b-1f-3", "a-2e-4", "a-1f-x", "raysubmit_1"], 1),
    ],
)
def test_an_attempt_is_numbered_after_the_last_of_the_same_job(ids: list[str], expected: int):
    assert next_attempt(ids, "a-1f-") == expected


def test_relative_paths_are_kept_here_and_refused_elsewhere(job_file: Path, tmp_path: Path):
    submission = read_submission(
        str(job_file), ("run.folder=runs/a", "data.shards=s3://b/shards"), None
    )
    there = {"run.folder": f"{tmp_path}/runs/a", "data.shards": "s3://b/shards"}
    assert submission.places_of(tmp_path) == there
    with pytest.raises(BadInput, match=r"^run.folder runs/a: the cluster is not this machine"):
        submission.places_of(None)
    absolute = read_submission(str(job_file), (), None)
    assert absolute.places_of(None) == absolute.places


def script(place: Path, told: str) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(f"#!/bin/sh\n{told}\n")
    place.chmod(0o755)
    return place


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with what a shell needs, and no Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("tr", "sed"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def ran(command: str, folder: Path, path: str, raylet: str = "") -> subprocess.CompletedProcess:
    """The command as the grandchild of a process with the arguments of a raylet."""
    child = f"import subprocess, sys; sys.exit(subprocess.call({command!r}, shell=True))"
    between = (
        f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {child!r}]))"
    )
    arguments = ["--node_id=1", raylet, "--java_worker_command="]
    return subprocess.run(
        [sys.executable, "-c", between, *arguments],
        cwd=folder,
        env={"PATH": path},
        capture_output=True,
        text=True,
    )


def test_the_entry_point_runs_in_the_folder_where_relative_paths_mean_the_same(
    tmp_path: Path, tools: Path
):
    assert entry_point("fid", None).endswith('; exec "$python" -P -m cat_ray fid job.yaml')
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    script(tmp_path / "bin/python", 'pwd\necho "$@"')
    told = ran(entry_point("train", folder), tmp_path, f"{tmp_path}/bin:{tools}")
    assert told.stdout == f"{folder}\n-P -m cat_ray train {tmp_path}/job.yaml\n"
    folder.rmdir()
    gone = ran(entry_point("train", folder), tmp_path, f"{tmp_path}/bin:{tools}")
    assert gone.returncode and not gone.stdout


@pytest.mark.parametrize(
    ("on_path", "of_ray", "taken"),
    [
        (("python", "python3"), "venv/bin/python3", "venv/bin/python3"),
        ((), "venv/bin/python3", "venv/bin/python3"),
        (("python", "python3"), None, "bin/python"),
        (("python3",), None, "bin/python3"),
        (("python",), "gone/python", "bin/python"),
    ],
)
def test_the_head_runs_a_job_with_the_python_that_runs_ray_there(
    tmp_path: Path, tools: Path, on_path: tuple[str, ...], of_ray: str | None, taken: str
):
    for name in on_path:
        script(tmp_path / "bin" / name, 'echo "$0"; exit 75')
    raylet = ""
    if of_ray is not None:
        raylet = f"--python_worker_command={tmp_path}/{of_ray} setup_worker.py default_worker.py"
        if not of_ray.startswith("gone"):
            script(tmp_path / of_ray, 'echo "$0"; exit 75')
    told = ran(entry_point("train", None), tmp_path, f"{tmp_path}/bin:{tools}", raylet)
    assert (told.stdout, told.stderr, told.returncode) == (f"{tmp_path}/{taken}\n", "", 75)


def test_a_head_without_any_python_is_told_in_one_line_and_bad_input(tmp_path: Path, tools: Path):
    told = ran(entry_point("train", None), tmp_path, str(tools))
    assert (told.stdout, told.returncode) == ("", 2)
    (line,) = told.stderr.splitlines()
    assert line.startswith("cat-ray: the head has no python: run `ray start` there with ")


def test_metadata_tells_run_configuration_and_commit_and_nothing_of_the_environment(
    job_file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    submission = read_submission(str(job_file), (), "night")
    told = metadata(submission, 2, "/runs/a", "c0ffee", ships_code=True)
    assert told["run"] == "night" and told["attempt"] == "2" and told["git_commit"] == "c0ffee"
    assert told["config_sha256"] == submission.digest
    assert "hush" not in str(told)


def test_the_commit_is_the_codes_and_says_if_files_differ(tmp_path: Path):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git("init")
    # It lies in a repository, and isn't part of it.
    assert code_commit(package) == "unknown"
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "notes").write_text("elsewhere")
    assert code_commit(package) == commit
    (package / "__init__.py").write_text("changed")
    assert code_commit(package) == f"{commit}+changes"


# What travels.


def test_all_code_travels_with_the_data_that_pyproject_names():
    root = Path(__file__).parents[2]
    own = root / "cat_ray"
    listed = subprocess.run(
        ["git", "-C", own, "ls-files", "."], check=True, capture_output=True, text=True
    ).stdout.split()
    # What is for people stays here.
    needed = {f"cat_ray/{name}" for name in listed if Path(name).suffix not in (".md", ".svg")}
    assert needed == set(code_files(own))
    project = tomllib.loads((root / "pyproject.toml").read_text())
    named = project["tool"]["setuptools"]["package-data"].items()
    assert {
        f"{package.replace('.', '/')}/{name}" for package, names in named for name in names
    } == {f"cat_ray/{name}" for name in DATA}


@pytest.mark.parametrize("name", ["__main__.py", "operations/gpus.yaml"])
def test_a_package_made_of_links_is_refused_and_not_sent_without_them(tmp_path: Path, name: str):
    package = tmp_path / "cat_ray"
    shutil.copytree(Path(__file__).parents[2] / "cat_ray", package)
    (package / name).rename(tmp_path / "cached")
    (package / name).symlink_to(tmp_path / "cached")
    with pytest.raises(BadInput, match=f"{name} is missing or a link.*--installed"):
        code_files(package)


def test_what_was_sent_runs_without_anything_installed_of_ours(job_file: Path, tmp_path: Path):
    folder = tmp_path / "sent"
    folder.mkdir()
    fill(folder, job_file.read_text(), code_files())
    ran = subprocess.run(
        [sys.executable, "-P", "-c", "import cat_ray.__main__ as m; print(m.__file__)"],
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    # Typer ends the process with its usage: the command line came up.
    assert "Usage: cat-ray" in ran.stdout + ran.stderr


def test_too_much_to_send_is_one_line_with_the_biggest_files(tmp_path: Path):
    check_size({"a.py": LIMIT_BYTES - 1})
    with pytest.raises(BadInput) as refused:
        check_size({"a.py": 2000, "b.csv": 60_000_000, "c.json": 1_500_000, "d.csv": 70_000_000})
    told = str(refused.value)
    assert "131.5 MB, its limit is 104.9 MB" in told
    assert "d.csv 70.0 MB, b.csv 60.0 MB, c.json 1.5 MB:" in told
    assert "--installed" in told and "\n" not in told
    (tmp_path / "table.csv").write_bytes(bytes(LIMIT_BYTES))
    with pytest.raises(BadInput, match=r"table\.csv"):
        fill(tmp_path / "sent", "", {"cat_ray/table.csv": tmp_path / "table.csv"})
    assert not (tmp_path / "sent").exists()


# Which ends are tried again.

ENDINGS = [
    # code, stopped; exit code, word, goes on, goes on where failures are retried
    (0, False, 0, "finished", False, False),
    (1, False, 1, "failed", False, True),
    (2, False, 2, "bad input", False, False),
    (75, False, 75, "unfinished", True, True),
    (127, False, 127, "failed", False, False),
    (-9, False, 137, "killed by SIGKILL", True, True),
    (137, False, 137, "killed by SIGKILL", True, True),
    (-15, False, 143, "killed by SIGTERM", True, True),
    (None, True, 75, "stopped", False, False),
    (None, False, 1, "lost", True, True),
]


@pytest.mark.parametrize(("code", "stopped", "exit_code", "word", "again", "failures"), ENDINGS)
def test_an_end_is_tried_again_where_the_same_command_may_do_better(
    code, stopped, exit_code, word, again, failures
):
    ending = Ending(stopped, code)
    assert (ending.exit_code, ending.word) == (exit_code, word)
    assert goes_on(ending, retry_failures=False) == again
    assert goes_on(ending, retry_failures=True) == failures


def test_what_ray_tells_of_a_command_that_was_lost_is_told_in_the_line():
    assert str(Ending(False, None, "the node died")) == "lost (the node died)"
    assert str(Ending(False, 1, "last available logs")) == "failed"


@given(code=st.none() | st.integers(-64, 255), retry_failures=st.booleans())
def test_what_somebody_stopped_is_never_started_again(code, retry_failures):
    assert not goes_on(Ending(True, code), retry_failures)
    assert 0 <= Ending(False, code).exit_code <= 255


def test_pauses_grow_up_to_five_minutes():
    pauses = [pause_seconds(retry) for retry in range(1, 9)]
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300]


def test_a_log_tells_the_checkpoint_that_a_run_stopped_with():
    places = [locate(f"/runs/a b/images-00000000{images}-3f9a1c") for images in (1600, 3200)]
    log = "".join(f"cat-ray: {stopped_with(place)} (stop); run it again\n" for place in places)
    assert checkpoint_told(log) == "/runs/a b/images-000000003200-3f9a1c"
    assert "3,200 images" in log
    assert checkpoint_told(f"cat-ray: {stopped_with(None)} (stop)\n") is None


# What is told before anything is sent.


@pytest.mark.parametrize(("address", "own"), [("127.0.0.1", True), ("203.0.113.1", False)])
def test_a_cluster_is_this_machine_if_this_machine_has_its_addresses(address: str, own: bool):
    assert is_own_address(address) == own


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--address", "127.0.0.1:8265"), "write it as http://HOST:8265"),
        (("--address", "http://127.0.0.1:9"), "nobody answers at http://127.0.0.1:9"),
        (("--address", "http://127.0.0.1:9", "--set", "run.sede=1"), "did you mean run.seed?"),
        (("--address", "http://127.0.0.1:9", "--retries", "2"), "--retries needs --follow"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], told: str
):
    # The client sets it, so that no other address wins over the one that was given.
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    result = CliRunner().invoke(app, ["submit", str(job_file), *options])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("cat-ray: ") and told in line
