"""Whether the training is still sound, when it has to go back, and the record of its going back.

Every worker judges the same figures, the whole batch's, and so comes to the same verdict.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from cat_ray.checkpoint.records import Count, first_problem
from cat_ray.errors import Damaged, NotFound
from cat_ray.storage import Location

ROLL_BACKS = "rollbacks.json"


@dataclass(frozen=True)
class Limits:
    """What a step may show, and how often in a row it may show more.

    The generator's loss is softplus of the margin by which the discriminator puts reals before
    fakes: from a few logits on, that margin. The slope of the discriminator's own loss is about
    e^-margin. With a margin of 20 it is 2e-9, and only the penalties still move D.

    Attributes:
        bad_steps: after so many bad steps in a row the run rolls back, at least 1.
        penalty: the largest R1 or R2 of a good step, in (logits per unit of pixel value) squared.
        won_accuracy, won_generator_loss: a discriminator has won that ranks at least this share of
            the pairs rightly, 0 to 1, while the generator's loss is at least this, in logits.
    """

    bad_steps: int
    penalty: float
    won_accuracy: float
    won_generator_loss: float


@dataclass(frozen=True)
class Health:
    """How many steps in a row were bad so far, and what was wrong with the last of them."""

    bad: int = 0
    reason: str | None = None


def judge(figures: Mapping[str, float], limits: Limits) -> str | None:
    """What is wrong with a step, in one line with its numbers, or None for a good one.

    Args:
        figures: means over the whole batch: `d_accuracy`, `g_loss`, `r1` and `r2`, and any others,
            which only have to be finite.
        limits: what a good step keeps to.
    """
    broken = [f"{name} {value}" for name, value in figures.items() if not math.isfinite(value)]
    if broken:
        return f"figures that are not finite: {', '.join(broken)}"
    problems = []
    accuracy, generator_loss = figures["d_accuracy"], figures["g_loss"]
    if accuracy >= limits.won_accuracy and generator_loss >= limits.won_generator_loss:
        problems.append(
            f"the discriminator has won: it ranks {accuracy:.1%} of the pairs rightly, and the "
            f"generator's loss is {generator_loss:.4g} (limit {limits.won_generator_loss:g})"
        )
    steep = [
        f"{name} is {figures[name]:.4g}" for name in ("r1", "r2") if figures[name] > limits.penalty
    ]
    if steep:
        problems.append(
            f"the discriminator is too steep: {' and '.join(steep)} (limit {limits.penalty:g})"
        )
    return "; ".join(problems) or None


def after_step(health: Health, figures: Mapping[str, float], limits: Limits) -> Health:
    """The health after one more step; a good step makes up for all bad ones before it."""
    reason = judge(figures, limits)
    return Health() if reason is None else Health(health.bad + 1, reason)


def must_roll_back(health: Health, limits: Limits) -> bool:
    """Whether so many steps in a row were bad that the run has to go back."""
    return health.bad >= limits.bad_steps


def roll_back_message(health: Health, images: int, to_images: int, noise_stream: int) -> str:
    """Tells a researcher why the run goes back and what usually helps, in two lines.

    Args:
        health: after the last bad step.
        images: images seen by then.
        to_images: images seen at the checkpoint that the run goes back to, 0 for its beginning.
        noise_stream: number of the noise stream that it goes on with.
    """
    place = f"the checkpoint at {to_images:,} images" if to_images else "the beginning"
    return (
        f"Rolling back from {images:,} images to {place}: {health.reason} (bad steps in a row: "
        f"{health.bad}). The run goes on with fresh noise, stream {noise_stream}.\n"
        "If it comes to this again: a lower optimisation.generator.learning_rate and "
        "optimisation.discriminator.learning_rate or a larger objective.penalty.weight usually "
        "helps, in another run.folder."
    )


@dataclass(frozen=True)
class RollBack:
    """One time that a run went back: from where, to where, both in images seen, and why."""

    images: Count
    to_images: Count
    reason: str


_FILE = TypeAdapter(tuple[RollBack, ...])


def read_roll_backs(run: Location) -> tuple[RollBack, ...]:
    """All roll-backs of a run, the oldest first; their number is the noise stream in force.

    Raises:
        Damaged: the record is not as it was written.
    """
    place = run / ROLL_BACKS
    try:
        content = place.read()
    except NotFound:
        return ()
    try:
        return _FILE.validate_json(content, strict=True)
    except ValidationError as error:
        raise Damaged(
            f"{place.uri} is damaged ({first_problem(error)}): restore it; without it the run "
            "would draw the noise again that failed"
        ) from error


def add_roll_back(run: Location, roll_back: RollBack) -> None:
    """Adds one to the record; only the first worker does this.

    Raises:
        Damaged: the record is not as it was written.
    """
    known = read_roll_backs(run)
    (run / ROLL_BACKS).write(_FILE.dump_json((*known, roll_back), indent=1))
