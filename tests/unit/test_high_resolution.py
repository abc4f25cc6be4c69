"""CAT-H at 512 and 1024 pixels, at a small width: it plans, it trains, it goes on from below."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cat_ray.checkpoint.transfer import applied
from cat_ray.config import Config, load
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.operations.gpus import find_gpu
from cat_ray.operations.plain_training import plain_state
from cat_ray.operations.plan import Assumptions, make_plan
from cat_ray.operations.save_size import Rates
from cat_ray.training.beginning import rules_between
from cat_ray.training.draws import draw_step
from cat_ray.training.reals import Reals
from cat_ray.training.steps import Adversaries, MicroBatch, training_step

JOBS = Path(__file__).parents[2] / "jobs"
CPU = torch.device("cpu")
SMALL = (
    "data.num_classes=3",
    "latents.vae=null",
    "objective.alignment.weight=0",
    "model.generator.size={depth: 4, width: 16, heads: 1}",
    "model.discriminator.size={depth: 1, width: 16, heads: 1}",
    "model.discriminator.projection_width=16",
    "optimisation.batch_size=2",
    "optimisation.lanes=2",
    "workers={minimum: 1, maximum: 1}",
    "run.total_images=4",
)
ANCHORED = ("model.generator.position_grid=16", "model.discriminator.position_grid=16")
VARIANTS = [("cat_h2_512", ()), ("cat_h2_512", ANCHORED), ("cat_h2_1024", ())]


def job(name: str, *changes: str) -> Config:
    return load(str(JOBS / f"{name}.yaml"), changes)


def trained(config: Config, steps: int) -> tuple[Adversaries, list[dict[str, Tensor]]]:
    """Both networks after so many steps on random latents, and the steps' figures."""
    state, side, figures = plain_state(config, CPU), config.model.resolution, []
    torch.manual_seed(0)
    labels = torch.tensor([0, 2])
    for at in range(steps):
        images = torch.randn(2, config.model.channels, side, side)
        draws = draw_step(config, range(2), at, CPU)
        micro_batch = MicroBatch(Reals(images, None), labels, draws)
        figures.append(training_step(state.adversaries, state.averages, [micro_batch])[0])
    return state.adversaries, figures


def held(adversaries: Adversaries) -> Sequence[Tensor]:
    modules = (adversaries.generator.module, adversaries.discriminator.module)
    return [p.detach().clone() for module in modules for p in module.parameters()]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_a_variant_trains_two_steps_at_a_small_width(name: str, changes: tuple[str, ...]) -> None:
    config = job(name, *SMALL, *changes)
    assert (config.model.resolution, config.model.stages) == (64 if "512" in name else 128, 4)
    before, (after, figures) = held(trained(config, 0)[0]), trained(config, 2)
    assert all(bool(value.isfinite()) for told in figures for value in told.values())
    moved = [not torch.equal(a, b) for a, b in zip(before, held(after), strict=True)]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_a_variant_plans(name: str, changes: tuple[str, ...]) -> None:
    assumptions = Assumptions(find_gpu("H100"), 16, 8, 0.25, 1.0, Rates())
    plan = make_plan(job(name, *changes), assumptions)
    assert plan.networks.generator.parameters / 1e6 == pytest.approx(960, abs=1)
    assert not [problem for problem in plan.problems if "that a worker can use of" in problem]


@pytest.mark.parametrize(
    ("below", "name", "changes"),
    [
        ("cat_h2_256", "cat_h2_512", ANCHORED),
        ("cat_h2_512", "cat_h2_1024", ()),
    ],
)
def test_a_variant_goes_on_from_the_one_below(
    below: str, name: str, changes: tuple[str, ...]
) -> None:
    old, new = job(below, *SMALL), job(name, *SMALL, *changes)
    adversaries, _ = trained(old, 1)
    state = {
        "generator": adversaries.generator.module.state_dict(),
        "discriminator": adversaries.discriminator.module.state_dict(),
    }
    made: dict[str, dict[str, Tensor]] = {group: {} for group in state}
    for rule in rules_between(old, new).rules:
        if rule.group in made:
            made[rule.group][rule.tensor] = applied(rule, state[rule.group][rule.tensor])
    build_discriminator(new).load_state_dict(made["discriminator"])
    generator = build_generator(new)
    generator.load_state_dict(made["generator"])
    side = new.model.resolution
    z = torch.randn(1, new.model.generator.latent_width)
    assert generator(z, torch.zeros(1, dtype=torch.long)).shape == (4, 1, 4, side, side)
