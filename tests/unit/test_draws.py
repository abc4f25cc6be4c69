"""A step's random numbers: each lane's are its own, whoever computes it."""

from dataclasses import fields
from itertools import combinations

import pytest
import torch
from torch import Tensor

from cat_ray.config import Config, parse
from cat_ray.objective.augment import AugmentDraws
from cat_ray.training.draws import StepDraws, draw_step
from cat_ray.training.lanes import share

CPU = torch.device("cpu")
# Flips alone are few enough to agree by chance.
CONTINUOUS = [field.name for field in fields(AugmentDraws) if field.name != "flip"]
PURPOSES = ("discriminator_real", "discriminator_fake", "generator_real", "generator_fake")


@pytest.fixture
def config(tiny_job: str) -> Config:
    overrides = ["optimisation.batch_size=24", "run.total_images=48", "objective.penalty.share=0.5"]
    return parse(tiny_job, "job.yaml", overrides)


def tensors(draws: StepDraws) -> dict[str, Tensor]:
    """All of a step's draws but the choice of penalised rows, by name."""
    named = {"latents": draws.latents}
    for purpose in PURPOSES:
        augmentation = getattr(draws, purpose)
        for field in fields(AugmentDraws):
            named[f"{purpose}.{field.name}"] = getattr(augmentation, field.name)
    for kind in ("noise_real", "noise_fake"):
        for scale, noise in enumerate(getattr(draws, kind)):
            named[f"{kind}.{scale}"] = noise
    return named


def continuous(draws: StepDraws) -> dict[str, Tensor]:
    return {name: value for name, value in tensors(draws).items() if not name.endswith("flip")}


def assert_joined(parts: list[StepDraws], whole: StepDraws) -> None:
    for name, value in tensors(whole).items():
        assert torch.equal(torch.cat([tensors(part)[name] for part in parts]), value), name


@pytest.mark.parametrize("lanes", [range(0, 4), range(1, 3), range(2, 4), range(3, 4)])
def test_several_lanes_draws_are_each_lanes_own_one_after_the_other(config, lanes):
    each = [draw_step(config, range(lane, lane + 1), 3, CPU) for lane in lanes]
    assert_joined(each, draw_step(config, lanes, 3, CPU))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_step_is_the_same_for_any_number_of_workers(config, world_size):
    lanes = config.optimisation.lanes
    parts = [
        draw_step(config, share(lanes, world_size, rank), 3, CPU) for rank in range(world_size)
    ]
    whole = draw_step(config, range(lanes), 3, CPU)
    assert_joined(parts, whole)
    # A worker counts its own rows: together they are those of the whole batch.
    rows, first = [], 0
    for part in parts:
        rows += (part.penalised + first).tolist()
        first += len(part.latents)
    assert rows == whole.penalised.tolist()


def test_a_step_draws_the_same_again_whatever_was_drawn_between(config):
    torch.manual_seed(0)
    first = draw_step(config, range(4), 3, CPU)
    draw_step(config, range(4), 4, CPU)
    torch.manual_seed(1)
    assert_joined([draw_step(config, range(4), 3, CPU)], first)


def test_drawing_leaves_the_global_generator_alone(config):
    before = torch.get_rng_state()
    draw_step(config, range(4), 3, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_seeds_and_lanes_draw_differently(config):
    reseeded = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    variants = [
        draw_step(config, range(0, 2), 3, CPU),
        draw_step(config, range(2, 4), 3, CPU),
        draw_step(config, range(0, 2), 4, CPU),
        draw_step(reseeded, range(0, 2), 3, CPU),
    ]
    for one, other in combinations(variants, 2):
        for name, value in continuous(one).items():
            assert not torch.equal(value, continuous(other)[name]), name


def test_purposes_draw_differently(config):
    draws = draw_step(config, range(4), 3, CPU)
    for one, other in combinations(PURPOSES, 2):
        for name in CONTINUOUS:
            first, second = (getattr(getattr(draws, purpose), name) for purpose in (one, other))
            assert not torch.equal(first, second), (one, other, name)
    for real, fake in zip(draws.noise_real, draws.noise_fake, strict=True):
        assert not torch.equal(real, fake)


def test_every_image_has_its_draws_and_every_penalised_one_its_noise(config):
    draws = draw_step(config, range(1, 4), 0, CPU)
    assert draws.latents.shape == (18, config.model.generator.latent_width)
    for purpose in PURPOSES:
        for field in fields(AugmentDraws):
            assert getattr(getattr(draws, purpose), field.name).shape == (18,)
    for noise in (draws.noise_real, draws.noise_fake):
        assert [tuple(scale.shape) for scale in noise] == [
            (9, 1, side, side) for side in (4, 8, 16, 32)
        ]


def test_latents_and_noise_are_standard_normal(tiny_job):
    overrides = ["optimisation.batch_size=256", "run.total_images=256"]
    draws = draw_step(parse(tiny_job, "job.yaml", overrides), range(4), 0, CPU)
    for values in (draws.latents, draws.noise_real[-1], draws.noise_fake[-1]):
        assert values.mean().abs() < 0.03
        assert values.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("share_of_lane", "rows"),
    [
        (0.1, [0, 6, 12]),
        (0.5, [0, 1, 2, 6, 7, 8, 12, 13, 14]),
        (0.51, [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15]),
        (1.0, list(range(18))),
    ],
)
def test_the_first_images_of_each_lane_are_penalised(tiny_job, share_of_lane, rows):
    overrides = [
        "optimisation.batch_size=24",
        "run.total_images=48",
        f"objective.penalty.share={share_of_lane}",
    ]
    config = parse(tiny_job, "job.yaml", overrides)
    for lanes in (range(0, 3), range(1, 4)):
        assert draw_step(config, lanes, 0, CPU).penalised.tolist() == rows
