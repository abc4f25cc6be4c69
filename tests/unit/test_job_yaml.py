"""What a job's YAML can't hold is refused in one line, with its place."""

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cat_ray.config import Config, parse
from cat_ray.data.preparation import Preparation
from cat_ray.errors import BadInput, ExpectedError
from cat_ray.evaluation.measurement import Measurement
from cat_ray.job_yaml import DEEPEST, read_text, read_yaml

JOBS = Path(__file__).parents[2] / "jobs"
SHORTEST = "run: {folder: r, total_images: 512}\ndata: {shards: s, num_classes: 10}\n"
BILLION = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]\n"
    for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a: &a0 [x]\n" + "".join(f"b{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000))


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        parse(text, "job.yaml", overrides)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400
    return message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            f"{SHORTEST}run: {{}}\n",
            "line 3, column 1: the key run is given twice, before in line 1",
        ),
        (
            "run:\n  seed: 1\n  folder: r\n  seed: 2\n",
            "line 4, column 3: the key seed is given twice, before in line 2",
        ),
        ("run: {seed: 1, 'seed': 1}", "line 1, column 16: the key seed is given twice"),
        ("a: [{b: {c: 1, c: 2}}]", "the key c is given twice"),
        ("1: x", "the key 1 is not text: put it in quotes"),
        ("run: {null: x}", "the key null is not text"),
        ("run: {on: x}", "the key on is not text"),
        ("run: {? [a, b] : x}", "the key a list or a section is not text"),
        ("2026-01-01: x", "the key 2026-01-01 is not text"),
        ("run: {folder: 2026-01-01}", "2026-01-01 is a date: put it in quotes"),
        ("run: {folder: 2026-13-99}", "2026-13-99 is a date: put it in quotes"),
        ("run: !!python/object:os.system x", "line 1, column 6: a value has a tag"),
        ("run: !!python/object/apply:os.system [ls]", "a value has a tag"),
        ("run: !secret x", "a value has a tag"),
        ("run: !!binary eA==", "a value has a tag"),
        ("run: !!set {a}", "a value has a tag"),
        ("run: !!int x", "a value is not what its tag says"),
        ("run: !!bool x", "a value is not what its tag says"),
        ("run: !!int", "a value is not what its tag says"),
        ("run: {seed: 1:30}", "line 1, column 13: 1:30 may mean two numbers"),
        ("run: {seed: 010}", "010 may mean two numbers"),
        ("run: {rate: 1:30.5}", "1:30.5 may mean two numbers"),
        ("run: 0b_", "a value is not what its tag says"),
        (f"run: {'9' * 5000}", "a value is not what its tag says"),
        ("run: \0", "line 1 has the character #x0000"),
        ("run:\n\n  folder: \x1b[31m", "line 3 has the character #x001b"),
        ("run: \x7f", "the character #x007f"),
        ('run: "\\UFFFFFFFF"', "is not valid YAML"),
        ("[" * 5000, f"more than {DEEPEST} levels"),
        ("{a: " * 5000, f"more than {DEEPEST} levels"),
        ("[" * 5000 + "]" * 5000, f"more than {DEEPEST} levels"),
        ("\n".join(" " * n + "a:" for n in range(5000)), f"more than {DEEPEST} levels"),
        ("- " * 5000, f"more than {DEEPEST} levels"),
        (BILLION, "values, by aliases"),
        (CHAIN, "levels or 100,000 values, by aliases"),
        ("run: &a {seed: *a}", "an alias lies within what it stands for"),
        ("a: &a [*a]", "an alias lies within what it stands for"),
        ("a: *b", "an alias stands for nothing"),
        ("run: {folder: a}\n---\nrun: {}", "line 2, column 1"),
        ("run: {folder: a\ndata: [", "line 2"),
        ("\ta: 1", "line 1"),
        ("%YAML 9.9\n---\na: 1", "line 1"),
    ],
)
def test_what_no_job_can_hold_is_one_line_with_its_place(text, told):
    began = time.process_time()
    message = refusal(text)
    assert message.startswith("job.yaml is not valid YAML: ") and told in message
    assert time.process_time() - began < 2


@pytest.mark.parametrize("text", ["- run", "run", "3", "", "null", "[]", "~", "2.5", "# nothing"])
def test_a_list_a_value_or_nothing_is_no_job(text):
    assert "must hold sections" in refusal(text)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("run={seed: 1, seed: 2}", "--set run is not valid YAML: line 1, column 11: the key seed"),
        ("schedule=[{images: 1, images: 2}]", "--set schedule is not valid YAML"),
        ("run.folder=2026-01-01", "2026-01-01 is a date"),
        ("run.seed=!!python/name:os.system", "a value has a tag"),
        ("run.seed=\0", "the character #x0000"),
        (f"run.seed={'[' * 5000}", f"more than {DEEPEST} levels"),
    ],
)
def test_the_value_of_an_override_is_read_as_strictly(override, told):
    assert told in refusal(SHORTEST, override)


def number_keys() -> list[str]:
    """The dotted keys of the values of a job that are numbers with a fraction."""
    dotted = parse(SHORTEST, "job.yaml")
    found: list[str] = []

    def walk(values: dict, prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            elif isinstance(value, float):
                found.append(f"{prefix}{name}")

    walk(dotted.model_dump(), "")
    return found


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "'inf'", "'nan'", "1e999", "true"])
def test_no_key_takes_what_is_no_number(value):
    keys = number_keys()
    assert len(keys) > 20
    for key in [*keys, "cost.spot_per_gpu_hour", "workers.capacity_seconds", "run.total_images"]:
        assert f"{key}: " in refusal(SHORTEST, f"{key}={value}")
    for key in ("optimisation.betas", "optimisation.ema_decays"):
        # Of truth values Python makes numbers: there the list is told.
        place = key if value == "true" else f"{key}.1"
        assert f"{place}: " in refusal(SHORTEST, f"{key}=[0.0, {value}]")


def test_anchors_and_merged_sections_keep_working():
    text = (
        "run: &run {folder: r, total_images: 512}\n"
        "data: {shards: s, num_classes: 10}\n"
        "optimisation:\n"
        "  generator: &engine {learning_rate: 1.0e-4, zero_stage: 2}\n"
        "  discriminator:\n"
        "    <<: *engine\n"
        "    zero_stage: 1\n"
        "workers:\n"
        "  <<: [{minimum: 2}, {maximum: 3}]\n"
    )
    found = parse(text, "job.yaml")
    assert found.optimisation.discriminator.learning_rate == 1e-4
    assert found.optimisation.discriminator.zero_stage == 1
    assert (found.workers.minimum, found.workers.maximum) == (2, 3)
    assert read_yaml("a: &a {x: 1}\nb: *a\nc: *a\n", "x") == {n: {"x": 1} for n in "abc"}


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_our_own_jobs_hold_is_what_yaml_says(path):
    assert read_yaml(path.read_text(), path.name) == yaml.safe_load(path.read_text())


KINDS = {"quickstart": Config, "fid50k": Measurement, "prepare_imagenet": Preparation}
SAVED = {name: (JOBS / f"{name}.yaml").read_text() for name in KINDS}
PIECES = [
    *("\n", "\n  ", ": ", "- ", "{", "}", "[", "]", "&a ", "*a", "<<: *a\n", "!!int ", "!!x "),
    *(".inf", "1e400", "null", "2026-01-01", "'", '"', '"\\u', "\0", "\t", "| ", "> ", "%", "? "),
    *("---\n", "0b_", "1:2:3", "s3://b//k", "s3://a:b@c", "~", "$X", "schedule: [{images: 1}]\n"),
]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, str]:
    """A valid job of some kind with a few pieces put in or cut out."""
    name = draw(st.sampled_from(sorted(SAVED)))
    text = SAVED[name]
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 12))
        piece = draw(st.sampled_from(PIECES) | st.text(max_size=5))
        text = text[:at] + piece + text[at + cut :]
    return name, text


def check_mutated(job: tuple[str, str]) -> None:
    name, text = job
    try:
        parse(text, "job.yaml", (), KINDS[name])
    except ExpectedError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=2000)
@given(mutated())
@example(("quickstart", f"{SHORTEST}optimisation: {{lanes: 0}}"))
@example(("quickstart", f"{SHORTEST}schedule: [{{images: 512, set: {{model: 3}}}}]"))
@example(("fid50k", SAVED["fid50k"].replace("50000", "!!int ")))
@example(("quickstart", f"{SHORTEST}model: {{generator: {{size: {{dpth: 3}}}}}}"))
def test_a_job_with_faults_is_read_or_is_bad_input(job):
    check_mutated(job)


@pytest.mark.long
@settings(max_examples=10_000, deadline=2000)
@given(mutated())
def test_ten_thousand_jobs_with_faults_are_read_or_are_bad_input(job):
    check_mutated(job)


def test_a_file_that_is_too_large_for_a_job_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "job.yaml"
    with path.open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(BadInput, match="has more than 1,048,576 bytes"):
        read_text(str(path))


def test_text_that_begins_with_a_star_is_not_repeated():
    assert "hunter2" not in refusal("p: *hunter2secret")
