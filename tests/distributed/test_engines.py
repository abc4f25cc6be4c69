"""Two ZeRO engines take the steps that plain PyTorch takes, however they are set up."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cat_ray.checkpoint import layout
from cat_ray.checkpoint.read import newest, read_tensors
from cat_ray.config import Config, parse
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.storage import locate
from cat_ray.training.draws import draw_step
from cat_ray.training.randomness import Purpose, key
from cat_ray.training.reals import Reals
from cat_ray.training.steps import (
    Adversaries,
    MicroBatch,
    discriminator_step,
    generator_step,
)

STEPS = 5
TOLERANCE = 1e-6
# Micro-batches' gradients are added up in another order.
IN_PARTS_TOLERANCE = 3e-6
SCRIPT = Path(__file__).with_name("engine_steps.py")
CPU = torch.device("cpu")


def both(**engine: str | int) -> list[str]:
    """The same settings for both engines."""
    networks = ("generator", "discriminator")
    return [
        f"optimisation.{name}.{key}={value}" for name in networks for key, value in engine.items()
    ]


CHECKPOINTING, MICRO_BATCHES = (
    "optimisation.activation_checkpointing=true",
    "optimisation.micro_batch_lanes=3",
)
SETTINGS = {
    **{f"zero{stage}": both(zero_stage=stage) for stage in range(4)},
    **{f"offload{s}": both(zero_stage=s, offload="optimiser") for s in (1, 2, 3)},
    "offload-all": both(zero_stage=3, offload="all"),
    "checkpointing1": [*both(zero_stage=1), CHECKPOINTING],
    "checkpointing3": [*both(zero_stage=3), CHECKPOINTING],
    **{f"micro-batches{s}": [*both(zero_stage=s), MICRO_BATCHES] for s in range(4)},
    "everything": [*both(zero_stage=3, offload="all"), CHECKPOINTING, MICRO_BATCHES],
}

# What a default run tries; the rest differ from one of them in the stage alone.
SAMPLE = ("zero0", "zero1", "zero3", "offload2", "checkpointing3", "micro-batches0", "everything")

# Uneven shares at two ranks: seven lanes. The learning rate is that of CAT-H, 2e-4 * 768 / 1280:
# Adam divides a gradient by its own size, so that a tiny one's rounding is worth a share of it.
CHANGES = (
    "optimisation.generator={learning_rate: 1.2e-4, width_aware: false}",
    "optimisation.discriminator={learning_rate: 1.2e-4, width_aware: false}",
    "optimisation.batch_size=14",
    "optimisation.lanes=7",
    "run.total_images=140",
    "objective.penalty={sigma: 0.05, share: 0.5}",
)


class PlainEngine:
    """What an engine does, in four lines of PyTorch."""

    def __init__(self, module: nn.Module, rate: float, clip: float):
        self.module = module
        self.clip = clip
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=rate, betas=(0.0, 0.99), weight_decay=0.0
        )

    def __call__(self, *inputs):
        return self.module(*inputs)

    def gradient_norm(self) -> Tensor:
        return self.norm

    def descend(self, loss: Tensor, last: bool = True) -> None:
        assert last
        self.optimizer.zero_grad()
        loss.backward()
        self.norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain_training(config: Config, batches: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """The generator's, the discriminator's and the first average's weights, one process."""
    torch.manual_seed(key(config.run.seed, Purpose.INITIALISATION, 0) % 2**63)
    generator = build_generator(config)
    torch.manual_seed(key(config.run.seed, Purpose.INITIALISATION, 1) % 2**63)
    discriminator = build_discriminator(config)
    average = {name: value.detach().clone() for name, value in generator.named_parameters()}
    clip = config.optimisation.gradient_clip
    rates = (
        config.optimisation.generator.rate(config.model.generator.dimensions().width),
        config.optimisation.discriminator.rate(config.model.discriminator.dimensions().width),
    )
    adversaries = Adversaries(
        config,
        PlainEngine(generator, rates[0], clip),  # pyright: ignore[reportArgumentType]
        PlainEngine(discriminator, rates[1], clip),  # pyright: ignore[reportArgumentType]
    )
    decay = config.optimisation.ema_decays[0]
    for at in range(steps):
        images, labels = batches["images"][at], batches["labels"][at]
        draws = draw_step(config, range(config.optimisation.lanes), at, CPU)
        outputs = generator(draws.latents, labels)
        micro_batch = MicroBatch(Reals(images, images), labels, draws)
        discriminator_step(adversaries, micro_batch, outputs.detach())
        generator_step(adversaries, micro_batch, outputs)
        for name, value in generator.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * value.detach()
    return {
        **{f"generator.{name}": value for name, value in generator.state_dict().items()},
        **{f"discriminator.{name}": value for name, value in discriminator.state_dict().items()},
        **{f"average.{name}": value for name, value in average.items()},
    }


def engine_training(folder: Path, decay: float) -> dict[str, Tensor]:
    checkpoint = newest(locate(str(folder)))
    assert checkpoint is not None
    parts = {
        "generator": layout.GENERATOR,
        "discriminator": layout.DISCRIMINATOR,
        "average": layout.average_group(decay),
    }
    return {
        f"{part}.{name}": value
        for part, file in parts.items()
        for name, value in read_tensors(checkpoint, file).items()
    }


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over all elements, absolute for those up to 1 and relative above."""
    assert a.keys() == b.keys()
    return max(float(((a[name] - b[name]) / b[name].abs().clamp(min=1)).abs().max()) for name in a)


@pytest.fixture
def job(tmp_path: Path, tiny_job: str) -> Config:
    """The tiny job, with its batches on disk for the processes of the group."""
    (tmp_path / "job.yaml").write_text(tiny_job)
    config = parse(tiny_job, "job", CHANGES)
    (tmp_path / "job.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    random = torch.Generator().manual_seed(0)
    batches = {
        "images": torch.rand(2 * STEPS, 14, 1, 32, 32, generator=random) * 2 - 1,
        "labels": torch.randint(0, 10, (2 * STEPS, 14), generator=random),
    }
    safetensors.torch.save_file(batches, tmp_path / "batches.safetensors")
    return config


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        pytest.param(1, SAMPLE[:2], id="1"),
        pytest.param(2, SAMPLE, id="2"),
        *(pytest.param(n, tuple(SETTINGS), marks=pytest.mark.long, id=f"{n}-all") for n in (1, 2)),
    ],
)
def test_engines_take_the_steps_of_plain_pytorch(
    world_size: int,
    names: tuple[str, ...],
    job: Config,
    tmp_path: Path,
    run_group: Callable[..., None],
) -> None:
    settings = {name: SETTINGS[name] for name in names}
    run_group(SCRIPT, world_size, str(tmp_path), str(STEPS), json.dumps(settings))
    batches = safetensors.torch.load_file(tmp_path / "batches.safetensors")
    expected = plain_training(job, batches, STEPS)
    decay = job.optimisation.ema_decays[0]
    differences = {
        name: largest_difference(
            engine_training(tmp_path / f"{world_size}-{name}", decay), expected
        )
        for name in settings
    }
    print(f"{world_size} ranks, largest difference: {differences}")
    for name, difference in differences.items():
        in_parts = any(MICRO_BATCHES in change for change in settings[name])
        assert difference < (IN_PARTS_TOLERANCE if in_parts else TOLERANCE), differences

    for name in settings:
        leaks = json.loads((tmp_path / f"{world_size}-{name}.json").read_text())
        assert not any(leaked for at_step in leaks for leaked in at_step.values()), leaks


def test_a_checkpoint_goes_on_at_another_stage_and_size(
    job: Config, tmp_path: Path, run_group: Callable[..., None]
) -> None:
    batches = safetensors.torch.load_file(tmp_path / "batches.safetensors")
    expected = plain_training(job, batches, 2 * STEPS)
    decay = job.optimisation.ema_decays[0]

    def settings(*names: str) -> str:
        return json.dumps({name: SETTINGS[name] for name in names})

    run_group(SCRIPT, 2, str(tmp_path), str(STEPS), settings("offload-all"))
    saved = newest(locate(str(tmp_path / "2-offload-all")))
    assert saved is not None
    run_group(SCRIPT, 1, str(tmp_path), str(STEPS), settings("zero0", "offload2"), saved.uri)
    run_group(SCRIPT, 2, str(tmp_path), str(STEPS), settings("zero1", "zero3"), saved.uri)
    differences = {
        name: largest_difference(engine_training(tmp_path / f"resumed-{name}", decay), expected)
        for name in ("1-zero0", "1-offload2", "2-zero1", "2-zero3")
    }
    print(f"resumed from 2 ranks at ZeRO 3 with offload, largest difference: {differences}")
    assert max(differences.values()) < TOLERANCE, differences
