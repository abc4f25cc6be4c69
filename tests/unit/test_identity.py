"""A run folder goes on under what it was begun with, and under nothing else."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cat_ray.config import Config, dump, flatten, parse
from cat_ray.errors import BadInput
from cat_ray.operations.identity import CONFIG_NAME, DATA_NAME, claim, differences
from cat_ray.storage import Location, locate

JOB = """
run: {folder: somewhere, total_images: 64}
data: {shards: elsewhere, num_classes: 10}
model:
  channels: 1
  generator: {size: {depth: 4, width: 32, heads: 2}, patch: 4}
  discriminator: {size: {depth: 2, width: 32, heads: 2}, patch: 4}
objective: {consistency: {stage_weights: [1, 1, 1]}}
optimisation: {batch_size: 16, lanes: 4}
"""
FREE_SECTIONS = (
    "storage",
    "workers",
    "preemption",
    "checkpoints",
    "health",
    "cost",
    "reporting",
    "evaluation",
)
FREE_KEYS = {
    "run.folder",
    "run.total_images",
    "data.shards",
    "data.source",
    "data.max_broken_samples",
    "data.window_megabytes",
    "data.cache_folder",
    "data.cache_gigabytes",
    "objective.alignment.teacher",
    "optimisation.activation_checkpointing",
    "optimisation.reuse_generator_forward",
    "optimisation.micro_batch_lanes",
    "optimisation.compile",
    "optimisation.generator.zero_stage",
    "optimisation.discriminator.zero_stage",
}


def job(*overrides: str) -> Config:
    return parse(JOB, "job.yaml", overrides)


def is_free(key: str) -> bool:
    return key in FREE_KEYS or key.split(".")[0] in FREE_SECTIONS


def changed(config: BaseModel, key: str) -> Any:
    """The same configuration with another value of the same type under one dotted key."""
    first, _, rest = key.partition(".")
    value = getattr(config, first)
    if rest:
        other = changed(value, rest)
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, (int, float)):
        other = value + 1
    elif isinstance(value, tuple):
        other = (*value[:-1], value[-1] / 2) if value else ("other",)
    else:
        other = f"{value}-other"
    return config.model_copy(update={first: other})


def content(run: Location) -> dict[str, bytes]:
    assert run.local_path is not None
    files = [path for path in run.local_path.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


@pytest.fixture
def claimed(run: Location) -> Location:
    claim(run, job(), "digest")
    return run


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("key", flatten(job()))
def test_a_key_is_part_of_the_identity_unless_it_changes_no_number(key):
    told = differences(job(), changed(job(), key))
    assert told == [] if is_free(key) else len(told) == 1 and told[0].startswith(f"{key} is ")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("run.seed=1", "run.seed is 0 there, 1 here"),
        ("data.num_classes=11", "data.num_classes is 10 there, 11 here"),
        ("optimisation.lanes=8", "optimisation.lanes is 4 there, 8 here"),
        ("optimisation.batch_size=32", "optimisation.batch_size is 16 there, 32 here"),
        ("optimisation.ema_decays=[0.9]", "optimisation.ema_decays is [0.999] there, [0.9] here"),
        ("model.generator.patch=2", "model.generator.patch is 4 there, 2 here"),
        ("model.generator.size=S", "model.generator.size is unset there, S here"),
        ("model.generator.size=S", "model.generator.size.depth is 4 there, unset here"),
        ("objective.penalty.weight=1", "objective.penalty.weight is 0.1 there, 1.0 here"),
        (
            "objective.consistency.stage_weights=null",
            "objective.consistency.stage_weights is [1.0, 1.0, 1.0] there, unset here",
        ),
    ],
)
def test_another_configuration_is_refused_with_key_and_both_values(claimed, override, told):
    before = content(claimed)
    with pytest.raises(BadInput, match="belongs to another configuration") as caught:
        claim(claimed, job(override), "digest")
    assert told in str(caught.value)
    assert "choose another run.folder" in str(caught.value)
    assert content(claimed) == before


def test_all_differences_are_told_at_once(claimed):
    with pytest.raises(BadInput) as caught:
        claim(claimed, job("run.seed=1", "model.generator.patch=2", "workers.gpu=true"), "other")
    for words in ("run.seed", "model.generator.patch", "the shards hold other samples"):
        assert words in str(caught.value)
    assert "workers" not in str(caught.value)


def test_other_data_is_refused(claimed):
    before = content(claimed)
    with pytest.raises(BadInput, match="the shards hold other samples"):
        claim(claimed, job(), "another digest")
    assert content(claimed) == before


@pytest.mark.parametrize(
    "override",
    [
        "workers.maximum=4",
        "workers.cpus_per_worker=0.25",
        "reporting.log_every_images=16",
        "checkpoints.save_every_images=16",
        "run.total_images=640",
        "run.folder=moved",
        "data.shards=moved",
        "optimisation.generator.zero_stage=3",
        "optimisation.discriminator.zero_stage=0",
        "storage.endpoint_url=http://other:9000",
        "evaluation.protocol=classifier",
    ],
)
def test_what_changes_no_number_may_change_and_is_kept(claimed, override):
    claim(claimed, job(override), "digest")
    assert (claimed / CONFIG_NAME).read().decode() == dump(job(override))


def test_a_run_may_be_claimed_again_and_again(claimed):
    before = content(claimed)
    claim(claimed, job(), "digest")
    assert content(claimed) == before


def test_a_claim_leaves_the_configuration_and_the_digest(claimed):
    assert parse((claimed / CONFIG_NAME).read().decode(), "resolved") == job()
    assert (claimed / DATA_NAME).read() == b"digest"


@pytest.mark.parametrize("foreign", ["thesis.tex", "photos/cat.png"])
def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(run, foreign):
    (run / foreign).write(b"precious")
    with pytest.raises(BadInput, match="isn't empty and holds no run"):
        claim(run, job(), "digest")
    assert content(run) == {(run / foreign).path: b"precious"}


def test_an_empty_folder_is_as_good_as_none(run, tmp_path):
    (tmp_path / "run").mkdir()
    claim(run, job(), "digest")
    assert (run / CONFIG_NAME).read().decode() == dump(job())
    assert (run / DATA_NAME).read() == b"digest"


@pytest.mark.parametrize("name", [CONFIG_NAME, DATA_NAME])
def test_a_claim_that_was_killed_halfway_can_be_made_again(run, monkeypatch, name):
    write = Location.write

    def killed_before(place: Location, content: bytes) -> None:
        if place.name == name:
            raise KeyboardInterrupt
        write(place, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Location, "write", killed_before)
        claim(run, job(), "digest")
    claim(run, job(), "digest")
    assert (run / CONFIG_NAME).read().decode() == dump(job())
    assert (run / DATA_NAME).read() == b"digest"
