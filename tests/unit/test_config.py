"""Job files: strict about keys and values, plain about what is wrong, complete when dumped."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cat_ray.config import Config, dump, flatten, load, parse
from cat_ray.data.preparation import Preparation
from cat_ray.errors import BadInput
from cat_ray.model.sizes import SIZES, Size
from cat_ray.section import Section

FOLDER = Path(__file__).parents[2] / "jobs"
PREPARATIONS = sorted(FOLDER.glob("prepare_*.yaml"))
SHORTEST = "run: {folder: r, total_images: 512}\ndata: {shards: s, num_classes: 10}\n"


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        parse(text, "job.yaml", overrides)
    return str(caught.value)


def sections(section: type[Section] = Config, prefix: str = "") -> list[tuple[str, list[str]]]:
    """Each section's dotted prefix and its keys."""
    found = [(prefix, list(section.model_fields))]
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += sections(field.annotation, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize(
    ("typo", "key", "meant"),
    [
        (("lanes: 4", "lanse: 4"), "optimisation.lanse", "optimisation.lanes"),
        (
            ("patch: 4, mapping", "pach: 4, mapping"),
            "model.generator.pach",
            "model.generator.patch",
        ),
        (("workers:", "objectve: {}\nworkers:"), "objectve", "objective"),
        (("depth: 4", "dept: 4"), "model.generator.size.dept", "model.generator.size.depth"),
        (("folder:", "foldr:"), "run.foldr", "run.folder"),
    ],
)
def test_a_typo_is_named_with_its_place_and_the_key_that_was_meant(tiny_job, typo, key, meant):
    assert typo[0] in tiny_job
    message = refusal(tiny_job.replace(*typo, 1))
    assert message.startswith("job.yaml: ")
    assert f"unknown key {key}, did you mean {meant}?" in message


@pytest.mark.parametrize(
    ("prefix", "key"), [(prefix, key) for prefix, keys in sections() for key in keys]
)
def test_any_key_without_its_last_letter_is_unknown_and_recognised(prefix, key):
    message = refusal(SHORTEST, f"{prefix}{key[:-1]}=1")
    assert f"unknown key {prefix}{key[:-1]}, did you mean {prefix}{key}?" in message


def test_a_key_like_no_other_gets_no_suggestion(tiny_job):
    assert refusal(tiny_job, "optimisation.xyzzy=1") == "job.yaml: unknown key optimisation.xyzzy"


def test_all_problems_are_told_at_once(tiny_job):
    message = refusal(tiny_job, "run.sed=1", "checkpoints.keep=0", "workers.gpu=perhaps")
    assert all(key in message for key in ("run.sed", "checkpoints.keep", "workers.gpu"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimisation.lanes=5", ["optimisation: batch_size 16", "multiple of lanes 5"]),
        ("run.total_images=65", ["run.total_images 65", "batch_size 16: use 64"]),
        ("run.total_images=3", ["run.total_images 3", "batch_size 16: use 16"]),
        ("run.total_images=0", ["run.total_images", "greater than 0"]),
        ("run.seed=-1", ["run.seed", "greater than or equal to 0"]),
        ("model.generator.size.width=36", ["model.generator: width 36", "4 x heads (8)"]),
        ("model.discriminator.size.width=36", ["model.discriminator: width 36", "4 x heads (8)"]),
        ("model.generator.size.depth=6", ["model: the generator's depth 6", "multiple of stages"]),
        ("model.generator.size=Q", ["model.generator.size", "'S', 'B', 'M', 'L', 'XL' or 'H'"]),
        ("model.discriminator.patch=8", ["discriminator.patch 8", "use a smaller patch"]),
        ("model.resolution=30", ["resolution 30", "multiple of generator.patch 4"]),
        ("model.resolution=20", ["resolution 20", "halved 3 times"]),
        ("model.stages=1", ["model.stages", "greater than or equal to 2"]),
        ("workers.maximum=5", ["workers.maximum 5", "optimisation.lanes 4", "at least one lane"]),
        ("workers.minimum=3", ["workers: minimum 3", "maximum 2"]),
        ("optimisation.batch_size=many", ["optimisation.batch_size", "valid integer"]),
        ("optimisation.ema_decays=[0.9, 1.0]", ["optimisation: each of ema_decays", "[0, 1)"]),
        ("optimisation.ema_decays=[]", ["optimisation.ema_decays", "at least 1"]),
        ("optimisation.generator.zero_stage=4", ["optimisation.generator.zero_stage", "2 or 3"]),
        ("objective.penalty.share=1.5", ["objective.penalty.share", "less than or equal to 1"]),
        (
            "objective.consistency.stage_weights=[1, 1]",
            ["objective.consistency.stage_weights needs 3 values"],
        ),
        ("data.source=cifar", ["data.source", "'mnist'"]),
        ("data.num_classes=ten", ["data.num_classes", "valid integer"]),
        ("workers=2", ["workers", "dictionary"]),
        ("checkpoints.keep=0", ["checkpoints.keep", "greater than 0"]),
        ("evaluation.samples=99", ["evaluation.samples", "greater than or equal to 100"]),
        ("run.folder=null", ["run.folder", "valid string"]),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_what_it_must_be(tiny_job, override, told):
    message = refusal(tiny_job, override)
    assert all(words in message for words in told), message


@pytest.mark.parametrize("missing", ["run", "data", "run.folder", "data.num_classes"])
def test_what_must_be_given_is_asked_for(tiny_job, missing):
    values = yaml.safe_load(tiny_job)
    section, _, key = missing.partition(".")
    del (values[section] if key else values)[key or section]
    assert f"{missing}: Field required" in refusal(yaml.safe_dump(values))


@pytest.mark.parametrize("text", ["", "- run", "run", "3"])
def test_a_file_without_sections_is_no_job(text):
    assert "must hold sections" in refusal(text)


@pytest.mark.parametrize(
    ("path", "kind", "lacks"),
    [("prepare_imagenet", Config, "run and no data"), ("quickstart", Preparation, "source and no")],
)
def test_a_job_of_another_command_is_told_as_one(path, kind, lacks):
    with pytest.raises(BadInput, match=rf"{path}\.yaml has no {lacks}.*another command"):
        load(str(FOLDER / f"{path}.yaml"), kind=kind)


def test_broken_yaml_is_told_by_file_and_line():
    message = refusal("run: {folder: a}\ndata: [")
    assert message.startswith("job.yaml is not valid YAML")
    assert "line 2" in message
    assert "\n" not in message


def test_a_file_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match=r"absent\.yaml: No such file"):
        load(str(tmp_path / "absent.yaml"))


def test_a_file_that_is_not_text_is_bad_input(tmp_path):
    (tmp_path / "job.yaml").write_bytes(b"\x89PNG\xff")
    with pytest.raises(BadInput, match=r"job\.yaml is not a text file"):
        load(str(tmp_path / "job.yaml"))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.seed=7", 7),
        ("run.folder=s3://bucket/a=b", "s3://bucket/a=b"),
        ("workers.gpu=true", True),
        ("storage.region=eu-central-1", "eu-central-1"),
        ("optimisation.generator.learning_rate=1.0e-4", 1e-4),
        ("objective.penalty.share=0.5", 0.5),
        ("optimisation.ema_decays=[0.5]", [0.5]),
        ("model.generator.size.heads=4", 4),
        ("data.source=null", None),
    ],
)
def test_an_override_sets_one_key_and_leaves_the_others(job_file, override, value):
    before, after = flatten(load(str(job_file))), flatten(load(str(job_file), [override]))
    key = override.partition("=")[0]
    assert before[key] != value
    assert after == {**before, key: value}


def test_a_later_override_wins_and_sections_are_made_where_they_lack():
    config = parse(SHORTEST, "job.yaml", ["objective.penalty.weight=1", "objective.penalty={}"])
    assert config == parse(SHORTEST, "job.yaml")
    config = parse(SHORTEST, "job.yaml", ["objective.penalty.weight=1", "run.seed=1", "run.seed=2"])
    assert (config.objective.penalty.weight, config.run.seed) == (1, 2)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("run.seed", "write it as section.key=value"),
        ("run.seed.deep.er=1", "seed is a value, not a section"),
        ("model.generator.size.depth.x=8", "depth is a value, not a section"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(tiny_job, override, told):
    message = refusal(tiny_job, "run.seed=0", override)
    assert message == f"--set {override}: {told}"


@pytest.mark.parametrize("value", ["[", "{a", "a: b: c", "@x"])
def test_an_override_that_is_not_yaml_is_bad_input(tiny_job, value):
    assert refusal(tiny_job, f"run.folder={value}").startswith("--set run.folder")


rates = st.floats(1e-8, 1.0)
# Of folders; what else a URI can't have in it is told in test_uris.py.
names = st.text(st.characters(exclude_characters="\0$~:", exclude_categories=("Cs",)), min_size=1)
names = names.filter(str.strip)
jobs = st.fixed_dictionaries(
    {
        "run": st.fixed_dictionaries(
            {
                "folder": names,
                "total_images": st.integers(1, 99).map(lambda n: 512 * n),
            }
        ),
        "data": st.fixed_dictionaries({"shards": names, "num_classes": st.integers(1, 1000)}),
    },
    optional={
        "storage": st.fixed_dictionaries({"region": st.none() | st.text()}),
        "model": st.fixed_dictionaries(
            {
                "generator": st.fixed_dictionaries(
                    {
                        "size": st.sampled_from([*SIZES, {"depth": 8, "width": 64, "heads": 4}]),
                        "mapping_lr_multiplier": rates,
                    }
                )
            }
        ),
        "objective": st.fixed_dictionaries(
            {
                "consistency": st.fixed_dictionaries(
                    {"stage_weights": st.none() | st.tuples(rates, rates, rates)}
                )
            }
        ),
        "optimisation": st.fixed_dictionaries(
            {
                "ema_decays": st.lists(st.floats(0, 0.99999), min_size=1, max_size=3),
                "generator": st.fixed_dictionaries({"learning_rate": rates}),
            }
        ),
    },
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(jobs)
def test_a_dumped_configuration_parses_to_itself(values):
    config = Config.model_validate(values)
    text = dump(config)
    assert parse(text, "resolved") == config
    assert dump(parse(text, "resolved")) == text


def test_a_dump_names_every_key():
    resolved = yaml.safe_load(dump(parse(SHORTEST, "job.yaml")))
    for prefix, keys in sections():
        values = resolved
        for name in prefix.split(".")[:-1]:
            values = values[name]
        assert list(values) == keys


@pytest.mark.parametrize("network", ["generator", "discriminator"])
@pytest.mark.parametrize("name", SIZES)
def test_a_size_by_name_is_that_of_the_table(network, name):
    config = parse(SHORTEST, "job.yaml", [f"model.{network}.size={name}"])
    assert getattr(config.model, network).dimensions() == SIZES[name]


def test_a_size_may_be_given_by_its_numbers(tiny_job):
    model = parse(tiny_job, "job.yaml").model
    assert model.generator.dimensions() == Size(depth=4, width=32, heads=2)
    assert model.discriminator.dimensions() == Size(depth=2, width=32, heads=2)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("S", 4e-4), ("B", 2e-4), ("M", 2e-4), ("L", 1.5e-4), ("XL", 1.333e-4), ("H", 1.2e-4)],
)
def test_the_learning_rate_follows_the_width_unless_told_not_to(name, rate):
    resolved = parse(SHORTEST, "job.yaml").optimisation
    assert resolved.generator.rate(SIZES[name].width) == pytest.approx(rate, rel=5e-4)
    assert resolved.discriminator.rate(SIZES[name].width) == pytest.approx(rate, rel=5e-4)
    fixed = parse(SHORTEST, "job.yaml", ["optimisation.generator.width_aware=false"])
    assert fixed.optimisation.generator.rate(SIZES[name].width) == 2e-4


@pytest.mark.parametrize(
    ("lane_size", "share", "penalised"),
    [(4, 1.0, 4), (4, 0.5, 2), (4, 0.3, 2), (4, 0.01, 1), (1, 0.25, 1), (8, 0.25, 2)],
)
def test_the_penalised_share_of_a_lane_is_rounded_up(tiny_job, lane_size, share, penalised):
    overrides = [
        f"optimisation.batch_size={4 * lane_size}",
        f"run.total_images={4 * lane_size}",
        f"objective.penalty.share={share}",
    ]
    config = parse(tiny_job, "job.yaml", overrides)
    assert config.optimisation.lane_size == lane_size
    assert config.penalised_per_lane() == penalised


def test_the_recipe_is_the_default():
    config = parse(SHORTEST, "job.yaml")
    assert config.model.scales() == (4, 8, 16, 32)
    assert config.stage_weights() == pytest.approx((1 / 3, 1 / 2, 1))
    assert config.optimisation.betas == (0.0, 0.99)
    assert (config.optimisation.batch_size, config.optimisation.gradient_clip) == (512, 1.0)
    assert config.optimisation.ema_decays == (0.999,)


def test_a_configuration_cannot_be_changed_afterwards(tiny_job):
    config = parse(tiny_job, "job.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 1


@pytest.mark.parametrize("path", PREPARATIONS, ids=lambda path: path.stem)
def test_the_jobs_that_prepare_are_whole(path):
    assert load(str(path), kind=Preparation).output.folder
