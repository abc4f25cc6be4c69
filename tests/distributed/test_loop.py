"""The loop with bad steps: none is saved, a run goes back to the last good one, no bit is lost."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from cat_ray.checkpoint.read import CheckpointReader, complete, newest
from cat_ray.storage import locate

SCRIPT = Path(__file__).with_name("loop_steps.py")
STAGES = (0, 1, 2, 3)
BATCH, SAVE_EVERY, TOTAL = 16, 32, 96
# After 64 images a step has been skipped, and some are still to come.
RESUMED_FROM = 64

# Small networks: a step takes milliseconds. Saves, figures and grids come in the same steps.
CHANGES = (
    "model.resolution=8",
    "model.stages=2",
    "model.generator={size: {depth: 2, width: 20, heads: 1}, patch: 2, latent_width: 7}",
    "model.discriminator={size: {depth: 1, width: 28, heads: 1}, patch: 1, projection_width: 9}",
    f"run.total_images={TOTAL}",
    f"checkpoints={{save_every_images: {SAVE_EVERY}, keep: 9}}",
    f"reporting={{log_every_images: {SAVE_EVERY}, grid_every_images: {SAVE_EVERY}, trackers: []}}",
    "health.bad_steps=2",
)


@dataclass(frozen=True)
class Case:
    """A run in which steps that end at these images are bad, see `loop_steps.py`.

    With `again_from`, another run, NAME-again, goes on from its checkpoint of so many images.
    """

    name: str
    stage: int
    bad: tuple[int, ...] = ()
    how: str = "reals"
    again_from: int | None = None

    @property
    def changes(self) -> tuple[str, ...]:
        """Of the job."""
        networks = ("generator", "discriminator")
        stages = (f"optimisation.{name}.zero_stage={self.stage}" for name in networks)
        return (*CHANGES, *stages)


def cases() -> list[Case]:
    each = [
        case
        for stage in STAGES
        for case in (
            Case(f"saving{stage}", stage, (SAVE_EVERY,)),
            Case(f"last{stage}", stage, (TOTAL,)),
        )
    ]
    skipped = [
        Case(f"skipped-{how}{stage}", stage, (BATCH,), how, RESUMED_FROM)
        for stage in STAGES[1:]
        for how in ("reals", "penalty")
    ]
    untold = [Case(f"untold{images}", 0, (images,), "gradient") for images in (64, TOTAL)]
    # Stage 3 last: with it DeepSpeed replaces torch's linear function, for good.
    return sorted([*each, *skipped, *untold], key=lambda case: case.stage)


@dataclass(frozen=True)
class Trained:
    """What became of the runs of one number of workers."""

    folder: Path

    def groups(self, name: str) -> list[list]:
        """Each worker group's first and last images, and how it ended, the same for all."""
        told = [json.loads(path.read_text()) for path in self.folder.glob(f"{name}.*.json")]
        assert told and all(each == told[0] for each in told)
        return told[0]

    def saved(self, name: str) -> list[int]:
        """Images of each checkpoint, in order; each number in them is finite."""
        found = []
        for checkpoint in complete(locate(str(self.folder / name))):
            reader = CheckpointReader(checkpoint)
            for group in {piece.group for piece in reader.manifest.slices}:
                for tensor, values in reader.tensors(group).items():
                    assert values.isfinite().all(), (checkpoint.uri, group, tensor)
            found.append(reader.state.images)
        return sorted(found)

    def last(self, name: str) -> CheckpointReader:
        """The newest checkpoint."""
        checkpoint = newest(locate(str(self.folder / name)))
        assert checkpoint is not None
        return CheckpointReader(checkpoint)


@pytest.fixture(scope="module")
def known() -> dict[int, Trained]:
    """What was trained so far, by number of workers."""
    return {}


@pytest.fixture
def trained(
    tiny_job: str,
    tmp_path_factory: pytest.TempPathFactory,
    run_group: Callable[..., None],
    known: dict[int, Trained],
) -> Callable[[int], Trained]:
    def of(size: int) -> Trained:
        if size not in known:
            folder = tmp_path_factory.mktemp(f"loop{size}")
            (folder / "job.yaml").write_text(tiny_job)
            run_group(SCRIPT, size, str(folder), listed(cases()))
            known[size] = Trained(folder)
        return known[size]

    return of


def listed(cases: list[Case]) -> str:
    return json.dumps([{**asdict(case), "changes": case.changes} for case in cases])


sizes = pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
stages = pytest.mark.parametrize("stage", STAGES)


@sizes
@stages
def test_a_step_that_is_bad_is_not_saved_but_the_next_good_one_is(trained, size, stage):
    found, name = trained(size), f"saving{stage}"
    if stage == 0:
        # The weights are lost: two bad steps in a row.
        assert found.groups(name) == [[0, 48, "roll-back"], [0, TOTAL, "finished"]]
        assert found.saved(name) == [32, 64, 96]
    else:
        # DeepSpeed has skipped it.
        assert found.groups(name) == [[0, TOTAL, "finished"]]
        assert found.saved(name) == [48, 64, 96]


@sizes
@stages
def test_a_run_does_not_end_with_a_bad_step_but_goes_back_to_the_last_good_one(
    trained, size, stage
):
    found, name = trained(size), f"last{stage}"
    assert found.groups(name) == [[0, TOTAL, "roll-back"], [64, TOTAL, "finished"]]
    assert found.saved(name) == [32, 64, 96]


@sizes
@pytest.mark.parametrize("images", [64, TOTAL])
def test_weights_that_are_not_finite_are_not_saved_though_no_figure_tells(trained, size, images):
    found, name = trained(size), f"untold{images}"
    before = images - SAVE_EVERY
    assert found.groups(name) == [[0, images, "roll-back"], [before, TOTAL, "finished"]]
    assert found.saved(name) == [32, 64, 96]


@sizes
@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("how", ["reals", "penalty"])
def test_a_run_that_goes_on_after_a_skipped_step_is_the_uninterrupted_one_bit_for_bit(
    trained, size, stage, how
):
    name = f"skipped-{how}{stage}"
    found = trained(size)
    assert found.groups(name) == [[0, TOTAL, "finished"]]
    assert found.groups(f"{name}-again") == [[RESUMED_FROM, TOTAL, "finished"]]
    expected, again = found.last(name), found.last(f"{name}-again")
    for group in {piece.group for piece in expected.manifest.slices}:
        values = again.tensors(group)
        for tensor, value in expected.tensors(group).items():
            assert torch.equal(values[tensor], value), (group, tensor)
    steps = TOTAL // BATCH
    counted = (again.state.generator_steps, again.state.discriminator_steps)
    assert counted == (steps if how == "penalty" else steps - 1, steps - 1)
