"""How a network goes on from another's weights: at more pixels, or on a finer grid of tokens.

Every tensor of the new network has one rule. All but two kinds of layer know nothing of pixels and
are copied; these two turn a token into its patch of p x p pixels and back.

    The generator's heads, on the same grid: each pixel's row of weights is repeated over r x r new
    pixels. The new picture is the old one, each pixel r x r times.
    On a finer grid: a token stands where its part of an old token's patch was (`position_grid`), so
    its pixels are those in the middle of the old patch, interpolated. Pictures that rise evenly
    keep doing so; with the patch's mean for all of them, every patch would be one flat step.
    The discriminator's embedding: the old patch is stretched onto the new one, each weight spread
    over r x r pixels or summed over them. On the same grid, D of the new picture is D of its
    averages over r x r; on a finer one a flat patch is embedded as before, and the weights still
    tell edges and their direction, which a mean over the patch would not.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from cat_ray.checkpoint.layout import DISCRIMINATOR, GENERATOR, average_group
from cat_ray.config import Config, Network
from cat_ray.errors import BadInput

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
Axis = tuple[tuple[float, ...], ...]

# What must be as it was: other values make other tensors, or mean something else by the same ones.
SAME = (
    "data.num_classes",
    "model.channels",
    "model.stages",
    "model.generator.size",
    "model.generator.latent_width",
    "model.generator.mapping_lr_multiplier",
    "model.discriminator.size",
    "model.discriminator.projection_width",
    "model.discriminator.class_lr_multiplier",
    "model.discriminator.scope",
)
# Of a wholly other job's differences: the first ones tell it.
SHOWN = 4
# The teacher's projector comes and goes with objective.alignment.
OPTIONAL = "projector."


@dataclass(frozen=True)
class Rule:
    """Where one tensor of a new network comes from.

    Attributes:
        group: of the new state, as in a checkpoint: G, D, or one of G's averages.
        tensor: its name.
        source: the checkpoint's group with the tensor of the same name; None begins at random.
        told: the rule in words.
        axis: on each side of a patch, what part each new pixel (row) has of each old one (column);
            None copies.
    """

    group: str
    tensor: str
    source: str | None
    told: str
    axis: Axis | None = None


@dataclass(frozen=True)
class Transfer:
    """The rules for all tensors of a new state, and the old tensors that it has no use for."""

    rules: tuple[Rule, ...]
    left_out: tuple[str, ...]

    def told(self) -> Iterator[tuple[str, str, int, str]]:
        """Group, names, number of tensors, and rule; a line for tensors that belong together."""
        rows = [
            (rule.group, _family(rule.tensor, rule.axis is not None), rule.told)
            for rule in self.rules
        ]
        rows += [("left out", _family(name), "the new network has none") for name in self.left_out]
        order = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        for (group, names, told), same in groupby(sorted(rows, key=order.__getitem__)):
            yield group, names, len(list(same)), told


def transfer(old: Config, new: Config, old_shapes: Shapes, new_shapes: Shapes) -> Transfer:
    """The rules by which `new` goes on from a checkpoint of `old`.

    An average that the checkpoint doesn't have begins at the generator's weights, as every average
    does at the start of a run.

    Args:
        old, new: the configurations.
        old_shapes, new_shapes: of the tensors of both states, by group and name.

    Raises:
        BadInput: something can't go on, with what differs and what to do.
    """
    if problems := [*_differences(old, new), *_grids(old, new)]:
        raise BadInput(f"can't go on from those weights: {'; '.join(problems)}")
    head, embedding = _head(old, new), _embedding(old, new)
    rules: list[Rule] = []
    for group, tensors in new_shapes.items():
        source, began = group, ""
        if group not in old_shapes and group.startswith(average_group(0).removesuffix("0")):
            source, began = GENERATOR, ", of G's weights: the checkpoint has no such average"
        known = old_shapes.get(source, {})
        for name, shape in tensors.items():
            if name not in known and name.startswith(OPTIONAL):
                rules.append(Rule(group, name, None, "at random: the checkpoint has none"))
                continue
            told, axis = "copied", None
            if group != DISCRIMINATOR and ".output." in name and name.startswith("heads."):
                told, axis = head
            elif group == DISCRIMINATOR and name == "patch_embedding.weight":
                told, axis = embedding
            if name not in known or _resized(name, known[name], axis) != shape:
                was = known.get(name, "missing")
                raise BadInput(f"{group} {name} can't be continued: {was} there, {shape} here")
            rules.append(Rule(group, name, source, told + began, axis))
    left_out = [
        name
        for group in (GENERATOR, DISCRIMINATOR)
        for name in old_shapes[group]
        if name not in new_shapes[group]
    ]
    if lost := [name for name in left_out if not name.startswith(OPTIONAL)]:
        raise BadInput(f"the new network has no place for {', '.join(lost)}")
    return Transfer(tuple(rules), tuple(left_out))


def applied(rule: Rule, values: Tensor) -> Tensor:
    """The new tensor that a rule makes of the old one."""
    if rule.axis is None:
        return values
    axis = torch.tensor(rule.axis, dtype=torch.float64)
    side = axis.shape[1]
    if rule.group == DISCRIMINATOR:
        patches = values.double().unflatten(1, (-1, side, side))
        made = torch.einsum("ia,jb,ocab->ocij", axis, axis, patches).flatten(1)
    else:
        patches = values.double().unflatten(0, (-1, side, side))
        made = torch.einsum("ia,jb,cab...->cij...", axis, axis, patches).flatten(0, 2)
    return made.to(values.dtype)


def repeated(old: int, new: int) -> Axis:
    """Each of `old` pixels `new / old` times."""
    return tuple(tuple(float(j == i * old // new) for j in range(old)) for i in range(new))


def sampled(old: int, new: int, share: float) -> Axis:
    """The middle `share` of `old` pixels at the centres of `new` ones, linearly interpolated."""
    rows = []
    for i in range(new):
        at = (((i + 0.5) / new - 0.5) * share + 0.5) * old - 0.5
        at = min(max(at, 0.0), old - 1.0)
        rows.append(tuple(max(0.0, 1.0 - abs(at - j)) for j in range(old)))
    return tuple(rows)


def stretched(old: int, new: int) -> Axis:
    """Each of `old` weights spread over `new / old` pixels, or `old / new` of them summed."""
    if new >= old:
        return tuple(tuple(old / new * part for part in row) for row in repeated(old, new))
    return tuple(tuple(float(j * new // old == i) for j in range(old)) for i in range(new))


def _head(old: Config, new: Config) -> tuple[str, Axis | None]:
    before, after = old.model.generator.patch, new.model.generator.patch
    share = _grid(old, "generator") / _grid(new, "generator")
    if share == 1:
        if before == after:
            return "copied", None
        r = after // before
        return f"each pixel repeated over {r} x {r}", repeated(before, after)
    told = f"the middle {share:.0%} of a side of its patch, interpolated to {after} x {after}"
    return told, sampled(before, after, share)


def _embedding(old: Config, new: Config) -> tuple[str, Axis | None]:
    before, after = old.model.discriminator.patch, new.model.discriminator.patch
    if before == after:
        return "copied", None
    r = max(before, after) // min(before, after)
    what = "spread over" if after > before else "summed over"
    return f"each pixel's weights {what} {r} x {r}", stretched(before, after)


def _differences(old: Config, new: Config) -> Iterator[str]:
    found = [
        f"{key} is {there} there, {here} here"
        for key in SAME
        if (there := _value(old, key)) != (here := _value(new, key))
    ]
    if found:
        more = f" and {len(found) - SHOWN} more" * (len(found) > SHOWN)
        yield f"{', '.join(found[:SHOWN])}{more}: set what differs as it was"


def _grids(old: Config, new: Config) -> Iterator[str]:
    for name in ("generator", "discriminator"):
        before: Network = getattr(old.model, name)
        after: Network = getattr(new.model, name)
        there, here = _grid(old, name), _grid(new, name)
        anchor = before.position_grid or there
        small, large = sorted((before.patch, after.patch))
        if here < there:
            yield (
                f"model.{name} has {there} x {there} tokens there, {here} x {here} here: a grid "
                "can't become coarser, take a smaller patch"
            )
        elif here == there and after.patch < before.patch:
            yield (
                f"model.{name} has the same {here} x {here} tokens, but {old.model.resolution} "
                f"pixels there and {new.model.resolution} here: pixels can't become fewer, set "
                f"model.resolution to {old.model.resolution} or more"
            )
        elif large % small:
            yield (
                f"model.{name}.patch is {before.patch} there, {after.patch} here: set it to a "
                f"multiple of {before.patch}, or with more tokens to a number that divides it"
            )
        elif (after.position_grid or here) != anchor:
            yield (
                f"model.{name} has {there} x {there} tokens there, {here} x {here} here: set "
                f"model.{name}.position_grid to {anchor}, so that they stand where those stood"
            )


def _grid(config: Config, network: str) -> int:
    return config.model.resolution // getattr(config.model, network).patch


def _value(config: Config, key: str) -> object:
    *sections, last = key.split(".")
    section = config
    for name in sections:
        section = getattr(section, name)
    if isinstance(section, Network) and last == "size":
        size = section.dimensions()
        return f"{size.depth} blocks of width {size.width} with {size.heads} heads"
    return getattr(section, last)


def _resized(name: str, shape: tuple[int, ...], axis: Axis | None) -> tuple[int, ...]:
    if axis is None:
        return shape
    at = 1 if name.startswith("patch_embedding") else 0
    pixels = shape[at] // len(axis[0]) ** 2 * len(axis) ** 2
    return (*shape[:at], pixels, *shape[at + 1 :])


def _family(name: str, exact: bool = False) -> str:
    if exact:
        return re.sub(r"\.\d+\.", ".*.", name)
    first, dot, _ = name.partition(".")
    return f"{first}.*" if dot else first
