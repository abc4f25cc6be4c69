"""Which checkpoint a run begins with: the same one at every call, and a sound one."""

from pathlib import Path

import pytest
import torch

from cat_ray.checkpoint.layout import DISCRIMINATOR, FOLDER, GENERATOR, State, average_group
from cat_ray.config import Config, dump, parse
from cat_ray.errors import BadInput
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.operations.identity import claim, differences
from cat_ray.storage import Location, locate
from cat_ray.training.beginning import initial_weights, pinned, rules


@pytest.fixture
def old_run(tmp_path: Path) -> Location:
    return locate(f"{tmp_path}/old")


@pytest.fixture
def save(old_run: Location, tiny_job: str, save_checkpoint):
    """Saves a checkpoint of the tiny job, with random weights, after so many images."""

    def saved(images: int) -> Location:
        config = parse(tiny_job, "job.yaml")
        torch.manual_seed(images)
        groups = {
            GENERATOR: build_generator(config).state_dict(),
            DISCRIMINATOR: build_discriminator(config).state_dict(),
            average_group(0.9): build_generator(config).state_dict(),
        }
        return save_checkpoint(old_run, State(images, 0, "digest", dump(config), {}), groups)

    return saved


def job(text: str, source: str, *overrides: str) -> Config:
    return parse(text, "job.yaml", [f"run.initialise_from={source}", *overrides])


def test_a_runs_folder_means_its_newest_checkpoint(tiny_job, tmp_path, old_run, save) -> None:
    save(32)
    newest = save(64)
    run = locate(f"{tmp_path}/new")
    assert pinned(job(tiny_job, old_run.uri), run).run.initialise_from == newest.uri
    assert pinned(job(tiny_job, newest.uri), run).run.initialise_from == newest.uri
    assert pinned(parse(tiny_job, "job"), run) == parse(tiny_job, "job")


def test_a_run_begins_with_the_same_weights_when_the_other_has_gone_on(
    tiny_job, tmp_path, old_run, save
) -> None:
    first = save(32)
    run, config = locate(f"{tmp_path}/new"), job(tiny_job, old_run.uri)
    claim(run, pinned(config, run), "digest")
    newer = save(64)
    assert pinned(config, run).run.initialise_from == first.uri
    claim(run, pinned(config, run), "digest")
    with pytest.raises(BadInput, match=f"initialise_from is {first.name} there, {newer.name} here"):
        claim(run, pinned(job(tiny_job, newer.uri), run), "digest")
    with pytest.raises(BadInput, match=f"initialise_from is {first.name} there, unset here"):
        claim(run, pinned(parse(tiny_job, "job"), run), "digest")


def test_the_same_checkpoint_may_lie_elsewhere(tiny_job) -> None:
    here, there = (job(tiny_job, f"{place}/{FOLDER}/images-1-a") for place in ("here", "there"))
    assert differences(here, there) == []


def test_a_damaged_checkpoint_is_passed_over_or_told(tiny_job, tmp_path, old_run, save) -> None:
    sound, damaged = save(32), save(64)
    for path in damaged.local_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    run = locate(f"{tmp_path}/new")
    assert pinned(job(tiny_job, old_run.uri), run).run.initialise_from == sound.uri
    with pytest.raises(BadInput, match=r"is damaged.*begin from another checkpoint"):
        pinned(job(tiny_job, damaged.uri), run)
    with pytest.raises(BadInput, match="neither a complete checkpoint nor a run"):
        pinned(job(tiny_job, f"{tmp_path}/nothing"), run)


def test_each_group_begins_with_its_own_weights_and_a_new_average_with_gs(
    tiny_job, old_run, save
) -> None:
    from cat_ray.checkpoint.read import read_tensors

    place = save(32)
    begun = initial_weights(job(tiny_job, place.uri))
    for group in (GENERATOR, DISCRIMINATOR, average_group(0.9)):
        stored = read_tensors(place, group)
        assert begun[group].keys() == stored.keys()
        assert all(torch.equal(begun[group][name], stored[name]) for name in stored)
    stored = read_tensors(place, GENERATOR)
    assert all(torch.equal(begun[average_group(0.5)][name], stored[name]) for name in stored)


def test_what_cant_go_on_is_told_with_the_checkpoint(tiny_job, save) -> None:
    place = save(32)
    with pytest.raises(BadInput, match=f"^{place.uri}: can't go on .* model.stages is 4 there"):
        rules(job(tiny_job, place.uri, "model.stages=2"))
