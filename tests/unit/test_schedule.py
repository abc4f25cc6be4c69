"""A job in phases: each is a valid run of its own, and begins as the one before ended."""

from pathlib import Path

import pytest

from cat_ray import schedule
from cat_ray.checkpoint.read import resolve
from cat_ray.cli.shell import existing_run
from cat_ray.config import Config, dump, parse
from cat_ray.errors import BadInput
from cat_ray.storage import locate
from cat_ray.training import driver
from cat_ray.training.phases import check_transitions, train_job

SCHEDULE = """
schedule:
  - images: 32
    set: {model.resolution: 16, model.generator.patch: 2, model.discriminator.patch: 2}
  - images: 32
"""


@pytest.fixture
def phased(tiny_job: str) -> str:
    return tiny_job + SCHEDULE


def phases(text: str, *overrides: str) -> tuple[Config, ...]:
    return schedule.phases(parse(text, "job.yaml", overrides))


def test_a_phase_is_the_job_with_its_own_values(phased: str, tmp_path: Path) -> None:
    first, second = phases(phased)
    assert (first.model.resolution, first.model.generator.patch) == (16, 2)
    base = parse(phased, "job.yaml")
    assert second == base.model_copy(update={"run": second.run, "schedule": ()})
    assert first.optimisation == base.optimisation
    runs = [phase.run for phase in (first, second)]
    assert [run.folder for run in runs] == [f"{tmp_path}/run/phase-{n}" for n in (1, 2)]
    assert [run.total_images for run in runs] == [32, 32]
    assert [run.seed for run in runs] == [0, 1]
    assert [run.initialise_from for run in runs] == [None, f"{tmp_path}/run/phase-1"]
    (transfer,) = check_transitions((first, second))
    assert {rule.told for rule in transfer.rules} > {"copied", "each pixel repeated over 2 x 2"}


def test_the_first_phase_may_begin_with_other_weights(phased: str) -> None:
    first, second = phases(phased, "run.initialise_from=elsewhere", "run.seed=7")
    assert (first.run.initialise_from, first.run.seed, second.run.seed) == ("elsewhere", 7, 8)
    assert second.run.initialise_from == first.run.folder


def test_a_schedule_is_written_out_and_read_again(phased: str) -> None:
    job = parse(phased, "job.yaml")
    assert parse(dump(job), "resolved") == job


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        (
            "{images: 32, set: {model.resolutoin: 16}}",
            "job.yaml, phase 2 of schedule: unknown key model.resolutoin, did you mean "
            "model.resolution?",
        ),
        (
            "{images: 32, set: {model.generator.patch: 5}}",
            "job.yaml, phase 2 of schedule: model: resolution 32 is not a multiple",
        ),
        ("{images: 16}", "the phases of schedule have 48 images together, run.total_images is 64"),
        ("{images: 32, sett: {}}", "phase 2 of schedule: unknown key sett, did you mean set?"),
        ("{images: 32, set: {run.seed: 3}}", "phase 2 of schedule: run.seed can't be set"),
        ("{images: 32, set: {schedule: []}}", "schedule can't be set for one phase"),
        ("{images: 32, set: {run: {}}}", "run can't be set for one phase"),
        ("{images: 32, set: {data.shards.x: 3}}", "data.shards.x: shards is a value"),
        ("{}", "phase 2 of schedule: images: Field required"),
    ],
)
def test_a_phase_that_is_no_job_is_told_when_the_file_is_read(
    phase: str, told: str, phased: str
) -> None:
    text = phased.rsplit("- images: 32", 1)[0] + f"- {phase}\n"
    with pytest.raises(BadInput) as caught:
        parse(text, "job.yaml")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_phases_end_with_whole_batches(phased: str) -> None:
    first, _, second = phased.rpartition("images: 32")
    text = first.replace("images: 32\n    set", "images: 40\n    set") + "images: 24" + second
    with pytest.raises(BadInput, match=r"phase 1 of schedule: run.total_images 40 is not a mult"):
        parse(text, "job.yaml")


def test_phases_that_cant_follow_each_other_are_told_before_anything_is_trained(
    phased: str, tmp_path: Path
) -> None:
    job = parse(phased.replace("model.generator.patch: 2, ", ""), "job.yaml")
    with pytest.raises(BadInput, match=r"phase 2 of schedule: .*position_grid to 4"):
        train_job(job)
    assert not (tmp_path / "run").exists()


def test_weights_that_the_first_phase_cant_begin_with_are_told_before_anything_is_written(
    phased: str, tmp_path: Path
) -> None:
    job = parse(phased, "job.yaml", [f"run.initialise_from={tmp_path}/nothing"])
    with pytest.raises(BadInput, match=rf"^phase 1 of schedule: .*{tmp_path}/nothing"):
        train_job(job)
    assert not (tmp_path / "run").exists()


def test_a_schedule_that_is_no_list_is_told(phased: str) -> None:
    with pytest.raises(BadInput, match=r"^job\.yaml: schedule: must be a list$"):
        parse(phased, "job.yaml", ["schedule=5"])


def test_a_folder_with_phases_is_told_to_whoever_needs_one_run(phased: str, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "run" / f"phase-{number}").mkdir(parents=True)
    place = locate(f"{tmp_path}/run")
    for look in (resolve, existing_run):
        with pytest.raises(
            BadInput, match=r"was trained in phases, name one: .*phase-1, .*phase-2"
        ):
            look(place)


def test_what_trains_one_run_refuses_a_schedule(phased: str) -> None:
    with pytest.raises(BadInput, match="without phases"):
        driver.train(parse(phased, "job.yaml"))


def test_a_folder_with_a_run_of_its_own_is_not_taken_for_phases(
    phased: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.resolved.yaml").write_text("precious")
    with pytest.raises(BadInput, match="holds a run without phases"):
        train_job(parse(phased, "job.yaml"))
