"""Everything that a run's future depends on: made from a seed, taken out, put back.

What is not here is a function of the seed and the images seen.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from cat_ray.checkpoint import layout
from cat_ray.checkpoint.read import CheckpointReader
from cat_ray.checkpoint.write import Slice
from cat_ray.config import Config
from cat_ray.model.build import build_discriminator, build_generator, compile_blocks
from cat_ray.objective.alignment import load_teacher
from cat_ray.storage import Location
from cat_ray.training.averaging import Averages
from cat_ray.training.beginning import initial_weights
from cat_ray.training.engines import Engine
from cat_ray.training.randomness import Purpose, key
from cat_ray.training.steps import Adversaries


@dataclass(frozen=True)
class TrainingState:
    """Both engines with their optimisers, and the generator's averages."""

    adversaries: Adversaries
    averages: Averages


def make_state(
    config: Config,
    device: torch.device,
    checkpoint: Location | None,
    engine: type[Engine] = Engine,
) -> TrainingState:
    """The state at the start of a run, or as a checkpoint holds it. Every worker must call this.

    A run that begins with another's weights begins without moments: Adam's beta1 is 0 here, and the
    second moments of other gradients would be wrong for as long as new ones take to be known.
    """
    dtype = _autocast_dtype(config, device)
    torch.manual_seed(_initial_seed(config, 0))
    generator = build_generator(config, dtype).to(device)
    torch.manual_seed(_initial_seed(config, 1))
    discriminator = build_discriminator(config, dtype).to(device)
    if config.optimisation.compile:
        compile_blocks(generator)
        compile_blocks(discriminator)
    reader = CheckpointReader(checkpoint) if checkpoint is not None else None
    begun = initial_weights(config) if reader is None and config.run.initialise_from else None
    if begun is not None:
        # Without the tensors that begin at random.
        generator.load_state_dict(begun[layout.GENERATOR], strict=False)
        discriminator.load_state_dict(begun[layout.DISCRIMINATOR], strict=False)
    if reader is not None:
        # Before the engines are made: their fp32 masters are copies of these.
        generator.load_state_dict(reader.tensors(layout.GENERATOR))
        discriminator.load_state_dict(reader.tensors(layout.DISCRIMINATOR))
    alignment, teacher = config.objective.alignment, None
    if alignment.weight:
        teacher = load_teacher(alignment.teacher, alignment.teacher_width).to(device)
    adversaries = Adversaries(
        config=config,
        generator=engine(
            generator,
            config.optimisation.generator,
            config.optimisation,
            config.model.generator.dimensions().width,
        ),
        discriminator=engine(
            discriminator,
            config.optimisation.discriminator,
            config.optimisation,
            config.model.discriminator.dimensions().width,
        ),
        teacher=teacher,
    )
    state = TrainingState(
        adversaries, Averages(adversaries.generator, config.optimisation.ema_decays)
    )
    if reader is not None:
        _restore(state, reader, device)
    if begun is not None:
        for decay in config.optimisation.ema_decays:
            state.averages.load(decay, partial(_run, begun[layout.average_group(decay)]))
    return state


def state_slices(state: TrainingState) -> list[Slice]:
    """What this worker saves of the state: all workers' slices together hold each element once.

    The values are views: the next step changes them.
    """
    adversaries, averages = state.adversaries, state.averages
    slices: list[Slice] = []
    for engine, weights, moments in (
        (adversaries.generator, layout.GENERATOR, layout.GENERATOR_MOMENTS),
        (adversaries.discriminator, layout.DISCRIMINATOR, layout.DISCRIMINATOR_MOMENTS),
    ):
        engine.release()
        for fragment in engine.fragments():
            held = {(weights, fragment.name): fragment.master}
            for moment, values in fragment.moments.items():
                held[moments, f"{fragment.name}.{moment}"] = values
            if engine is adversaries.generator:
                for decay in averages.decays:
                    held[layout.average_group(decay), fragment.name] = averages.fragment(
                        decay, fragment
                    )
            own = engine.own(fragment)
            slices += [
                Slice(
                    group,
                    name,
                    fragment.shape,
                    fragment.offset + own.start,
                    values[own.start : own.stop],
                )
                for (group, name), values in held.items()
                if own
            ]
    return slices


def is_finite(state: TrainingState) -> bool:
    """Whether every number that this worker would save is finite, waiting for the device."""
    # A sum is not finite if any of its parts isn't.
    return all(bool(piece.values.sum().isfinite()) for piece in state_slices(state))


def _restore(state: TrainingState, reader: CheckpointReader, device: torch.device) -> None:
    config = state.adversaries.config
    # Older checkpoints don't say how many steps the optimisers took.
    saved, steps = reader.state, reader.state.images // config.optimisation.batch_size
    generator_steps, discriminator_steps = (
        steps if counted is None else counted
        for counted in (saved.generator_steps, saved.discriminator_steps)
    )
    label = torch.zeros(1, dtype=torch.long, device=device)
    latent = torch.zeros(1, config.model.generator.latent_width, device=device)
    pyramid = [
        torch.zeros(1, config.model.channels, side, side, device=device)
        for side in config.model.scales()
    ]
    aligned_rows = 1 if state.adversaries.teacher else 0
    state.adversaries.generator.restore(
        partial(reader.run, layout.GENERATOR_MOMENTS), generator_steps, latent, label
    )
    state.adversaries.discriminator.restore(
        partial(reader.run, layout.DISCRIMINATOR_MOMENTS),
        discriminator_steps,
        pyramid,
        label,
        aligned_rows,
    )
    for decay in config.optimisation.ema_decays:
        state.averages.load(decay, partial(reader.run, layout.average_group(decay)))


def _run(tensors: dict[str, Tensor], name: str, offset: int, length: int) -> Tensor:
    """Elements `offset` to `offset + length` of a flattened tensor; zeros past its end."""
    values = tensors[name].flatten()[offset : offset + length]
    return F.pad(values, (0, length - len(values)))


def _initial_seed(config: Config, network: int) -> int:
    """A seed in PyTorch's range for the initial weights of G (0) or D (1)."""
    return key(config.run.seed, Purpose.INITIALISATION, network) % 2**63


def _autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    precision = config.optimisation.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
