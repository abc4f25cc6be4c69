"""The command line: plain words, an exit code that tells what can be done, no traceback."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from cat_ray.checkpoint.layout import (
    DISCRIMINATOR,
    FOLDER,
    GENERATOR,
    MANIFEST,
    State,
    average_group,
    folder_name,
    part_file,
    slice_file,
)
from cat_ray.cli import app
from cat_ray.config import dump, parse
from cat_ray.errors import BadInput, RunFailed, Unfinished
from cat_ray.exported import load_generator
from cat_ray.model.build import build_generator
from cat_ray.operations import drill, verify_resume
from cat_ray.operations.comparison import Compared
from cat_ray.operations.cost import NO_PRICES
from cat_ray.operations.drill import Drilled, Recovery
from cat_ray.operations.goodput import BINS, LEDGER, Row
from cat_ray.operations.identity import CONFIG_NAME
from cat_ray.operations.journal import MEASURED
from cat_ray.storage import Location, locate
from cat_ray.training import phases
from cat_ray.training.faults import Fault

COMMANDS = (
    "plan",
    "train",
    "submit",
    "status",
    "stop",
    "prepare",
    "sample",
    "fid",
    "export",
    "inspect",
    "cost",
    "drill",
    "verify-resume",
    "report",
    "bench",
    "doctor",
)


def call(*arguments: object) -> Result:
    # A line that is as long as it may be is broken elsewhere on another terminal.
    environment = {"COLUMNS": "120"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


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
def run(tmp_path: Path, tiny_job: str, save_checkpoint) -> Location:
    """A run folder with a checkpoint after 48 images and an unfinished one after 64."""
    config = parse(tiny_job, "job.yaml")
    place = locate(str(tmp_path / "run"))
    (place / CONFIG_NAME).write(dump(config).encode())
    torch.manual_seed(0)
    weights = build_generator(config).state_dict()
    names = (GENERATOR, average_group(0.9), average_group(0.5))
    groups = {**dict.fromkeys(names, weights), DISCRIMINATOR: {"logit": torch.zeros(3)}}
    save_checkpoint(place, State(48, 3, "digest", dump(config), {"torch": "9.8.7"}), groups)
    (place / FOLDER / folder_name(64, "3f9a1c") / slice_file(GENERATOR, 0, 1)).write(b"half")
    return place


# Help and job files.


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_the_help_lists_the_commands(arguments):
    result = call(*arguments)
    assert result.exit_code == (0 if arguments else 2)
    words = result.output.split()
    assert all(command in words for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_help(command):
    assert f"cat-ray {command}" in succeed(command, "--help")


@pytest.mark.parametrize(
    ("typo", "told"),
    [
        (
            ("lanes: 4", "lanse: 4"),
            "unknown key optimisation.lanse, did you mean optimisation.lanes?",
        ),
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
    assert "run.sede, did you mean run.seed?" in refuse("train", job_file, "--set", "run.sede=1")
    assert "section.key=value" in refuse("train", job_file, "--set", "run.seed")


def test_every_override_counts(job_file):
    line = refuse("train", job_file, "--set", "run.a=1", "--set", "run.b=1")
    assert "run.a" in line
    assert "run.b" in line


# How training ends.

FAILURES = [(RunFailed, 1), (BadInput, 2), (Unfinished, 75)]


@pytest.mark.parametrize(("error", "code"), FAILURES)
@pytest.mark.parametrize(
    ("module", "name", "command"),
    [
        (phases, "train_job", "train"),
        (drill, "drill", "drill"),
        (verify_resume, "verify_resume", "verify-resume"),
    ],
)
def test_a_run_that_ends_early_is_one_line_with_its_own_exit_code(
    job_file, monkeypatch, module, name, command, error, code
):
    def ends(*_: object) -> None:
        raise error("told why")

    monkeypatch.setattr(module, name, ends)
    result = call(command, job_file)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "cat-ray: told why\n")
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("schedule", ["nonsense", "kill@32,crash@64", "kill"])
def test_a_schedule_that_can_not_be_read_is_one_line(job_file, tmp_path, schedule):
    line = refuse("drill", job_file, "--schedule", schedule)
    assert line.startswith(f"--schedule {schedule.split(',')[-1]}: write kind@images")
    assert "raise, kill, stop" in line
    assert list(tmp_path.iterdir()) == [job_file]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["raise", "kill", "stop", "refuse", "truncate"]),
        (("--schedule", "kill@64,refuse@32:1"), ["refuse", "kill"]),
    ],
)
@pytest.mark.parametrize(
    ("came", "kept", "code", "words"),
    [
        (True, True, 0, ["pass", "2.5 s"]),
        (True, False, 1, ["FAIL", "2.5 s"]),
        (False, True, 1, ["pass", "never came"]),
    ],
)
def test_a_drill_passes_if_all_came_and_every_promise_was_kept(
    job_file, monkeypatch, options, expected, came, kept, code, words
):
    asked = []

    def found(config: object, faults: tuple[Fault, ...]) -> Drilled:
        asked.extend(fault.kind for fault in faults)
        recovery = Recovery(faults[0], 1.0 if came else None, 2.5, 16)
        return Drilled((recovery,), (("the run reached its end", kept, "64"),))

    monkeypatch.setattr(drill, "drill", found)
    result = call("drill", job_file, *options)
    assert (result.exit_code, result.stderr) == (code, "")
    assert asked == expected
    assert all(word in result.stdout for word in words)


@pytest.mark.parametrize(
    ("same", "code", "mark"), [((True, True), 0, "pass"), ((True, False), 1, "FAIL")]
)
def test_resumption_is_verified_if_nothing_differs(job_file, monkeypatch, same, code, mark):
    rows = [
        Compared("3 kills, 2 workers", what, "found", "allowed", each)
        for what, each in zip(("samples", "generator"), same, strict=True)
    ]
    monkeypatch.setattr(verify_resume, "verify_resume", lambda config: rows)
    result = call("verify-resume", job_file)
    assert (result.exit_code, result.stderr) == (code, "")
    assert mark in result.stdout


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
        (["--decay", "0.7"], "has no generator.average-0.7, it has"),
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


@pytest.fixture
def sampling(run: Location, tmp_path: Path) -> Path:
    """A job of samples of that run."""
    path = tmp_path / "sample.yaml"
    path.write_text(
        f"samples: {{checkpoint: {run.uri}, count: 10}}\n"
        f"output: {{folder: {tmp_path}/out, png: true}}\n"
    )
    return path


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--count", 4, "--out", "x"), "--out, --count can't go with a job: say it there, or with"),
        (("--set", "samples.cuont=5"), "unknown key samples.cuont, did you mean samples.count?"),
        (("--set", "features={}"), "unknown key features"),
        (("--set", "output.png=false"), "output keeps no samples: set output.png, output.shards"),
        (("--set", "samples.decay=0.7"), "samples.decay 0.7: the checkpoint has 0.9, 0.5"),
        (("--set", "latents.vae=a"), "the generator makes pictures: leave latents.vae out"),
    ],
)
def test_sample_refuses_what_a_job_can_not_have(sampling, tmp_path, options, told):
    assert told in refuse("sample", sampling, *options)
    assert not (tmp_path / "out").exists()


def test_sample_refuses_a_jobs_overrides_without_a_job(run):
    line = refuse("sample", run.uri, "--set", "samples.count=5")
    assert line == f"--set goes with a job, and {run.uri} is none: use the options"


def test_export_writes_a_folder_that_opens_and_refuses_to_write_it_again(run, tmp_path):
    out = tmp_path / "out"
    told = succeed("export", run.uri, "--out", out, "--decay", 0.5)
    assert told == f"open it with cat_ray.load_generator: {out}\n"
    assert load_generator(out).description.provenance["decay"] == 0.5
    assert refuse("export", run.uri, "--out", out) == f"{out} isn't empty: choose another --out"


@pytest.mark.parametrize("command", ["sample", "inspect"])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, command):
    line = refuse(command, tmp_path / "absent")
    assert line == f"{tmp_path}/absent is neither a complete checkpoint nor a run that has one"


def test_an_endpoint_without_http_is_one_line():
    assert "begin it with http://" in refuse("inspect", "s3://b/k", "--endpoint-url", "minio:9000")


# Inspection and report.


def test_inspect_shows_images_seen_and_every_file(run):
    told = succeed("inspect", run.uri)
    checkpoint = run / FOLDER / folder_name(48, "3f9a1c")
    assert checkpoint.uri in told
    assert "images seen 48 of 64" in told
    assert "noise stream 3" in told
    assert "averages [0.9, 0.5]" in told
    assert "torch 9.8.7" in told
    sizes = checkpoint.sizes()
    assert len(sizes) == 7
    for name, size in sizes.items():
        # The manifest lists neither itself nor the records that it joins.
        if name not in (MANIFEST, part_file(0, 1)):
            assert f" {name} " in told
            assert f" {size:,} " in told


def test_inspect_hashes_every_file_when_asked(run):
    checkpoint = run / FOLDER / folder_name(48, "3f9a1c")
    assert "every file has the sha256 of the manifest" in succeed("inspect", run.uri, "--verify")
    assert "every file" not in succeed("inspect", run.uri)
    for name in (slice_file(GENERATOR, 0, 1), slice_file(DISCRIMINATOR, 0, 1)):
        content = bytearray((checkpoint / name).read())
        content[-1] ^= 1
        (checkpoint / name).write(bytes(content))
    line = refuse("inspect", run.uri, "--verify")
    assert all(slice_file(name, 0, 1) in line for name in (GENERATOR, DISCRIMINATOR))
    assert slice_file(average_group(0.5), 0, 1) not in line


def test_report_writes_the_page_and_says_where(run):
    assert succeed("report", run.uri) == f"{run.uri}/report.html\n"
    assert (run / "report.html").exists()


def test_report_refuses_a_folder_that_is_no_run(tmp_path):
    line = refuse("report", tmp_path)
    assert line == f"{tmp_path} is no run folder: it has no config.resolved.yaml"
    assert list(tmp_path.iterdir()) == []


# Cost.


@pytest.fixture
def paid(run: Location) -> Location:
    """The same run with a ledger: two workers for half an hour each, 48 images."""
    for rank in range(2):
        rows = [
            Row("3f9a1c", rank, 2, 0.0, 0.0, 0, dict.fromkeys(BINS, 0.0)),
            Row(
                *("3f9a1c", rank, 2, 0.0, 1800.0, 48),
                {**dict.fromkeys(BINS, 0.0), "start": 360.0, "train": 1440.0},
                "finished",
            ),
        ]
        content = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        (run / LEDGER / f"3f9a1c-{rank:04d}.jsonl").write(content.encode())
    return run


def set_prices(run: Location, tiny_job: str, *prices: str) -> None:
    (run / CONFIG_NAME).write(dump(parse(tiny_job, "job.yaml", prices)).encode())


def test_cost_without_prices_is_time(paid):
    told = succeed("cost", paid.uri)
    assert "48 images, 1 group of 2 workers" in told
    assert "goodput 80.0%" in told
    assert NO_PRICES in told
    assert "$" not in told


def test_cost_with_the_runs_own_prices_is_money(paid, tiny_job):
    prices = ("cost.spot_per_gpu_hour=1.5", "cost.on_demand_per_gpu_hour=4")
    set_prices(paid, tiny_job, *prices)
    told = succeed("cost", paid.uri)
    (total,) = [line for line in told.splitlines() if line.startswith("│ total ")]
    assert [word for word in total.split() if word != "│"][1:] == [
        "3,600.0",
        "100.0%",
        "$1.5000",
        "$4.0000",
    ]
    # Eight tenths of an hour are needed, a whole one was paid for.
    assert "on demand without any loss $3.2000, spot $1.5000: spot saved $1.7000" in told


@pytest.mark.parametrize(
    ("prices", "bills"), [((), {}), (("cost.spot_per_gpu_hour=1.5",), {"spot": 1.5})]
)
def test_cost_tells_a_script_the_same_as_json(paid, tiny_job, prices, bills):
    set_prices(paid, tiny_job, *prices)
    content = json.loads(succeed("cost", paid.uri, "--json"))
    assert content["worker_seconds"]["total"] == 3600
    assert {name: each["total"] for name, each in content["bills"].items()} == bills


def test_cost_counts_measurements_beside_the_training(paid):
    row = {"kind": "measured", "session": "a", "worker_seconds": 600.0}
    rows = [{**row, "images": 32 * i} for i in (1, 2)]
    (paid / MEASURED).write("".join(json.dumps(row) + "\n" for row in rows).encode())
    content = json.loads(succeed("cost", paid.uri, "--json"))
    assert content["worker_seconds"]["total"] == 4800


def test_cost_of_a_run_before_its_first_row_is_nothing(run):
    assert "no worker group yet" in succeed("cost", run.uri)


def test_cost_refuses_a_folder_that_is_no_run(tmp_path):
    line = refuse("cost", tmp_path)
    assert line == f"{tmp_path} is no run folder: it has no config.resolved.yaml"


# Preparation.


@pytest.fixture
def preparation(tmp_path: Path) -> Path:
    """A job that makes shards of the digits."""
    path = tmp_path / "prepare.yaml"
    path.write_text(
        "source: {kind: mnist}\n"
        f"output: {{folder: {tmp_path}/shards, resolution: 32, channels: 1}}\n"
    )
    return path


def test_prepare_tells_what_was_made_and_the_second_time_what_is_there(preparation, tmp_path):
    for _ in range(2):
        told = succeed("prepare", preparation)
        assert told == f"5,000 images of 10 classes, 1 x 32 x 32, in 1 shards: {tmp_path}/shards\n"


def test_prepare_refuses_a_source_that_does_not_exist(preparation, tmp_path):
    line = refuse("prepare", preparation, "--set", "source.kind=imagnet")
    assert "source.kind: Input should be 'auto', 'folders', 'tars'" in line
    assert not (tmp_path / "shards").exists()


def test_prepare_refuses_a_folder_that_holds_something_else(preparation, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text("{}")
    assert "choose another output.folder" in refuse("prepare", preparation)


def test_prepare_refuses_another_job_in_a_folder(preparation, tmp_path):
    succeed("prepare", preparation)
    line = refuse("prepare", preparation, "--set", "output.seed=1")
    assert f"{tmp_path}/shards was begun with another job (output.seed: 0 -> 1)" in line


def test_prepare_refuses_an_unknown_key_and_names_the_nearest(preparation):
    line = refuse("prepare", preparation, "--set", "output.shard_imags=3")
    assert "unknown key output.shard_imags, did you mean output.shard_images?" in line
