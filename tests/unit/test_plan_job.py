"""`cat-ray plan` tells each phase of a job, and by which rules each run begins."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from cat_ray.checkpoint.layout import DISCRIMINATOR, GENERATOR, State, average_group
from cat_ray.cli import app
from cat_ray.config import dump, parse
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.storage import Location, locate

SCHEDULE = """
schedule:
  - images: 32
    set: {model.resolution: 16, model.generator.patch: 2, model.discriminator.patch: 2}
  - images: 32
"""


def plan(job: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["plan", str(job), *options])


@pytest.fixture
def below(tmp_path: Path, tiny_job: str, save_checkpoint) -> Location:
    """A checkpoint of the tiny job at 16 pixels, with one of its averages."""
    changes = ["model.resolution=16", "model.generator.patch=2", "model.discriminator.patch=2"]
    config = parse(tiny_job, "job", changes)
    torch.manual_seed(0)
    generator, discriminator = build_generator(config), build_discriminator(config)
    groups = {
        GENERATOR: generator.state_dict(),
        DISCRIMINATOR: discriminator.state_dict(),
        average_group(0.9): generator.state_dict(),
    }
    return save_checkpoint(locate(f"{tmp_path}/below"), State(32, 0, "", dump(config), {}), groups)


def test_each_phase_is_planned_and_the_second_says_how_it_begins(
    job_file: Path, tmp_path: Path
) -> None:
    job_file.write_text(job_file.read_text() + SCHEDULE)
    told = plan(job_file)
    assert told.exit_code == 0, told.output
    for words in ("phase 1 of 2", "phase 2 of 2", "blocks.*", "repeated over 2 x 2"):
        assert words in told.output
    assert told.output.count("32 images on 2 processes") == 2
    first, second = json.loads(plan(job_file, "--json").output)["phases"]
    assert first["rules"] is None and first["initialise_from"] is None
    assert second["initialise_from"] == f"{tmp_path}/run/phase-1"
    assert {
        "of": "discriminator",
        "tensors": "patch_embedding.weight",
        "count": 1,
        "rule": "each pixel's weights spread over 2 x 2",
    } in second["rules"]
    assert first["work"]["total"] < second["work"]["total"] * 1.01


def test_a_checkpoint_is_looked_into_and_its_rules_are_listed(
    job_file: Path, below: Location
) -> None:
    told = plan(job_file, "--initialise-from", below.uri, "--json")
    assert told.exit_code == 0, told.output
    values = json.loads(told.output)
    assert values["initialise_from"] == below.uri
    rules = {(rule["of"], rule["tensors"]): rule["rule"] for rule in values["rules"]}
    assert rules["generator", "heads.*.output.weight"] == "each pixel repeated over 2 x 2"
    assert "no such average" in rules["generator.average-0.5", "blocks.*"]
    assert rules["generator.average-0.9", "blocks.*"] == "copied"


def test_what_cant_go_on_is_one_line_and_exit_code_2(job_file: Path, below: Location) -> None:
    refused = plan(job_file, "--initialise-from", below.uri, "--set", "model.generator.patch=2")
    assert refused.exit_code == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "set model.generator.position_grid to 8" in refused.stderr
    missing = plan(job_file, "--initialise-from", f"{below.uri}-other")
    assert missing.exit_code == 2 and "neither a complete checkpoint" in missing.stderr


def test_the_memory_table_explains_what_it_shows_and_no_more(job_file: Path) -> None:
    on_cpu, on_gpu = plan(job_file), plan(job_file, "--gpu", "H100")
    assert on_cpu.exit_code == on_gpu.exit_code == 0, on_cpu.output + on_gpu.output
    for words in ("red: does not fit", "in the host's memory"):
        assert words not in on_cpu.output and words in on_gpu.output
