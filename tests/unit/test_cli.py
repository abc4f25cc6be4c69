"""The command line: plain words, exit code 2 for what the user can mend, no traceback."""

from pathlib import Path

import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from cat_ray.checkpoint.layout import DISCRIMINATOR, GENERATOR, State, average_file
from cat_ray.checkpoint.write import write_checkpoint
from cat_ray.cli import app
from cat_ray.config import dump, parse
from cat_ray.model.build import build_generator
from cat_ray.operations.identity import CONFIG_NAME
from cat_ray.storage import Location, locate


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = call(*arguments)
    assert (result.exit_code, result.stderr, result.exception) == (0, "", None), result.output
    return result.stdout


def refuse(*arguments: object) -> str:
    """The one line that the command ends with."""
    result = call(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("cat-ray: ")
    return line.removeprefix("cat-ray: ")


@pytest.fixture
def run(tmp_path: Path, tiny_job: str) -> Location:
    """A run folder with a checkpoint after 48 images and an unfinished one after 64."""
    config = parse(tiny_job, "job.yaml")
    place = locate(str(tmp_path / "run"))
    (place / CONFIG_NAME).write(dump(config).encode())
    torch.manual_seed(0)
    weights = build_generator(config).state_dict()
    files = [(name, weights) for name in (GENERATOR, average_file(0.9), average_file(0.5))]
    files.append((DISCRIMINATOR, {"logit": torch.zeros(3)}))
    write_checkpoint(place, State(48, "digest", dump(config), {"torch": "9.8.7"}), files)
    (place / "checkpoints" / "images-000000000064" / GENERATOR).write(b"half")
    return place


# Help and job files.


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_the_help_lists_the_commands(arguments):
    result = call(*arguments)
    assert result.exit_code == (0 if arguments else 2)
    words = result.output.split()
    assert all(command in words for command in ("train", "prepare", "sample", "inspect", "report"))


@pytest.mark.parametrize("command", ["train", "prepare", "sample", "inspect", "report"])
def test_each_command_has_a_help(command):
    assert f"cat-ray {command}" in succeed(command, "--help")


@pytest.mark.parametrize(
    ("typo", "told"),
    [
        (("lanes: 4", "lanse: 4"), "unknown key optimisation.lanse, did you mean lanes?"),
        (("lanes: 4", "lanes: 5"), "optimisation: batch_size 16 is not a multiple of lanes 5"),
        (("minimum: 2", "minimum: two"), "workers.minimum: Input should be a valid integer"),
    ],
)
def test_a_mistake_in_a_job_file_is_one_line(job_file, tiny_job, tmp_path, typo, told):
    job_file.write_text(tiny_job.replace(*typo))
    line = refuse("train", job_file)
    assert line.startswith(f"{job_file}: ")
    assert told in line
    assert list(tmp_path.iterdir()) == [job_file]


def test_a_job_file_that_is_not_yaml_is_one_line(job_file):
    job_file.write_text("run: {folder: a}\ndata: [")
    assert "is not valid YAML" in refuse("train", job_file)


def test_a_job_file_that_is_not_there_is_one_line(tmp_path):
    assert "absent.yaml: No such file" in refuse("train", tmp_path / "absent.yaml")


def test_a_bad_override_is_one_line(job_file):
    assert "run.sede, did you mean seed?" in refuse("train", job_file, "--set", "run.sede=1")
    assert "section.key=value" in refuse("train", job_file, "--set", "run.seed")


def test_every_override_counts(job_file):
    line = refuse("train", job_file, "--set", "run.a=1", "--set", "run.b=1")
    assert "run.a" in line
    assert "run.b" in line


# Samples.


def test_sample_writes_a_grid_and_single_pictures(run, tmp_path):
    out = tmp_path / "out"
    told = succeed("sample", run.uri, "--out", out, "--classes", "3,7", "--count", 2, "--seed", 5)
    assert told == f"4 pictures and grid.png: {out}\n"
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"class-000{c}-seed-5-00{n}.png" for c in (3, 7) for n in (0, 1)] + [
        "grid.png"
    ]
    for name in names:
        with Image.open(out / name) as image:
            assert image.size == ((64, 64) if name == "grid.png" else (32, 32))


def test_sample_repeats_itself_for_a_seed(run, tmp_path):
    made = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        succeed("sample", run.uri, "--out", tmp_path / name, "--classes", 4, "--seed", seed)
        made.append((tmp_path / name / "grid.png").read_bytes())
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--classes", "10"], "class 10 doesn't exist: there are 0 to 9"),
        (["--classes", "0,-1"], "class -1 doesn't exist"),
        (["--classes", "a,b"], "--classes a,b: write class ids separated by commas"),
        (["--decay", "0.7"], "has no generator.average-0.7.safetensors"),
    ],
)
def test_sample_refuses_what_the_checkpoint_does_not_have(run, tmp_path, arguments, told):
    assert told in refuse("sample", run.uri, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_sample_refuses_a_folder_that_holds_something(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    line = refuse("sample", run.uri, "--out", out)
    assert line == f"{out} isn't empty: choose another --out"
    assert [path.name for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("command", ["sample", "inspect"])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, command):
    line = refuse(command, tmp_path / "absent")
    assert line == f"{tmp_path}/absent is neither a complete checkpoint nor a run that has one"


def test_an_endpoint_without_http_is_one_line():
    assert "begin it with http://" in refuse("inspect", "s3://b/k", "--endpoint-url", "minio:9000")


# Inspection and report.


def test_inspect_shows_images_seen_and_every_file(run):
    told = succeed("inspect", run.uri)
    assert f"{run.uri}/checkpoints/images-000000000048" in told
    assert "images seen 48 of 64" in told
    assert "averages [0.9, 0.5]" in told
    assert "torch 9.8.7" in told
    files = [path for path in Path(f"{run.path}/checkpoints/images-000000000048").iterdir()]
    assert len(files) == 6
    for path in files:
        if path.name != "manifest.json":
            assert f" {path.name} " in told
            assert f" {path.stat().st_size:,} " in told


def test_report_writes_the_page_and_says_where(run):
    assert succeed("report", run.uri) == f"{run.uri}/report.html\n"
    assert (run / "report.html").exists()


def test_report_refuses_a_folder_that_is_no_run(tmp_path):
    line = refuse("report", tmp_path)
    assert line == f"{tmp_path} is no run folder: it has no config.resolved.yaml"
    assert list(tmp_path.iterdir()) == []


# Preparation.


def test_prepare_refuses_a_source_that_does_not_exist(tmp_path):
    assert refuse("prepare", "imagnet", tmp_path) == "no source named imagnet: there is mnist"


def test_prepare_refuses_a_folder_that_is_prepared(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    assert "choose another folder" in refuse("prepare", "mnist", tmp_path)
