"""A state that some workers saved at one ZeRO stage others go on from at another, bit for bit."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from cat_ray.checkpoint.layout import (
    DISCRIMINATOR,
    DISCRIMINATOR_MOMENTS,
    GENERATOR,
    GENERATOR_MOMENTS,
    average_group,
)
from cat_ray.checkpoint.read import CheckpointReader, resolve
from cat_ray.config import Config, parse
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.storage import locate

SCRIPT = Path(__file__).with_name("reshard_steps.py")
SIZES = (1, 2, 3, 4)
STEPS = 2
BATCH = 8
CLASSES = 5
RESOLUTION = 8
# What two numbers of workers round differently, of a step of 1.2e-4.
TOLERANCE = 1e-6

# Small networks with sizes that neither 2, 3 nor 4 divides, and one of 9 elements, of which four
# workers under ZeRO 3 get three each: the last has none. Learning rates as in test_engines.py.
CHANGES = (
    f"model.resolution={RESOLUTION}",
    "model.stages=2",
    "model.generator={size: {depth: 2, width: 20, heads: 1}, patch: 2, latent_width: 7}",
    "model.discriminator={size: {depth: 1, width: 28, heads: 1}, patch: 1, projection_width: 9}",
    f"data.num_classes={CLASSES}",
    f"optimisation.batch_size={BATCH}",
    "optimisation.generator={learning_rate: 1.2e-4, width_aware: false}",
    "optimisation.discriminator={learning_rate: 1.2e-4, width_aware: false}",
)
GROUPS = (
    GENERATOR,
    DISCRIMINATOR,
    GENERATOR_MOMENTS,
    DISCRIMINATOR_MOMENTS,
    average_group(0.9),
    average_group(0.5),
)


@dataclass(frozen=True)
class Case:
    """A state to save under a name: made and trained, or as the checkpoint `source` has it.

    With `next`, one more step is taken and saved as well.
    """

    name: str
    stage: int
    source: str | None = None
    next: bool = False


def saved_name(size: int, stage: int) -> str:
    return f"{size}-zero{stage}"


def loads(size: int, every: bool) -> list[Case]:
    """What so many workers load: all that others saved, at every stage or at some."""
    sharded = [
        (saver, a, b)
        for saver in SIZES
        for a in (1, 2, 3)
        for b in (1, 2, 3)
        if every or (size + saver + a + b) % 3 == 0 or (saver, a) == (size % 4 + 1, 2)
    ]
    whole = [(3, 0, b) for b in (0, 1, 2, 3)] + [(2, a, 0) for a in (1, 2, 3)]
    return [
        Case(
            f"{saved_name(saver, a)}-at-{saved_name(size, b)}",
            b,
            saved_name(saver, a),
            # Counts of steps are each stage's own affair, whoever saved.
            next=(saver, a) == (size % 4 + 1, 2) or (saver, a, b) == (2, 2, 0),
        )
        for saver, a, b in sharded + whole
    ]


def contents(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a run's checkpoint."""
    reader = CheckpointReader(resolve(locate(str(folder))))
    return {
        f"{group}: {name}": value
        for group in GROUPS
        for name, value in reader.tensors(group).items()
    }


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


@pytest.fixture
def job(tmp_path: Path, tiny_job: str) -> Config:
    """A job with odd sizes, and its batches on disk for the processes of the groups."""
    config = parse(tiny_job, "job", CHANGES)
    (tmp_path / "job.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    random = torch.Generator().manual_seed(0)
    shape = (STEPS + 1, BATCH, 1, RESOLUTION, RESOLUTION)
    batches = {
        "images": torch.rand(shape, generator=random) * 2 - 1,
        "labels": torch.randint(0, CLASSES, shape[:2], generator=random),
    }
    safetensors.torch.save_file(batches, tmp_path / "batches.safetensors")
    return config


def test_the_sizes_are_ones_that_no_number_of_workers_divides(job: Config) -> None:
    for network in (build_generator(job), build_discriminator(job)):
        sizes = [parameter.numel() for parameter in network.parameters()]
        assert all(any(count % size for count in [*sizes, sum(sizes)]) for size in SIZES[1:])
        assert sum(sizes) % 2
    # Four partitions of three: the last worker's is empty.
    assert 9 in [parameter.numel() for parameter in build_discriminator(job).parameters()]


@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.long)], ids=["sample", "every"]
)
def test_what_any_workers_saved_at_any_stage_any_others_load_bit_for_bit(
    every: bool, job: Config, tmp_path: Path, run_group: Callable[..., None]
) -> None:
    def run(size: int, cases: list[Case]) -> None:
        listed = json.dumps([asdict(case) for case in cases])
        run_group(SCRIPT, size, str(tmp_path), str(STEPS), listed)

    for size in SIZES:
        stages = (0, 1, 2, 3)
        run(size, [Case(saved_name(size, stage), stage, next=stage == 2) for stage in stages])
    saved = {
        saved_name(size, stage): contents(tmp_path / saved_name(size, stage))
        for size in SIZES
        for stage in (0, 1, 2, 3)
    }
    for name, tensors in saved.items():
        assert all(value.any() for value in tensors.values()), f"{name} tells nothing"

    astray, stepped = {}, {}
    for size in SIZES:
        cases = loads(size, every)
        run(size, cases)
        for case in cases:
            assert case.source is not None
            if lost := differing(contents(tmp_path / case.name), saved[case.source]):
                astray[case.name] = lost
            if case.next:
                stepped[case.name] = largest_difference(
                    contents(tmp_path / f"{case.name}-next"),
                    contents(tmp_path / f"{case.source}-next"),
                )
    assert astray == {}
    assert len(stepped) == len(SIZES) * len((0, 1, 2, 3))
    # An optimiser that has forgotten how many steps it took goes too far, by a third of a step.
    assert max(stepped.values()) < TOLERANCE, stepped
