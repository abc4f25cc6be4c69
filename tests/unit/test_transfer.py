"""Networks that go on from another's weights: a rule for each tensor, which does what it says."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cat_ray.checkpoint.layout import DISCRIMINATOR, GENERATOR, average_group
from cat_ray.checkpoint.transfer import applied, repeated, sampled, stretched, transfer
from cat_ray.config import Config, parse
from cat_ray.errors import BadInput
from cat_ray.model.build import build_discriminator, build_generator
from cat_ray.training.beginning import rules_between, shapes_of

JOB = """
run: {folder: somewhere, total_images: 64}
data: {shards: elsewhere, num_classes: 10}
model:
  resolution: 16
  channels: 3
  stages: 3
  generator: {size: {depth: 3, width: 32, heads: 2}, patch: 4}
  discriminator: {size: {depth: 2, width: 32, heads: 2}, patch: 4, projection_width: 32}
optimisation: {batch_size: 16, lanes: 4, ema_decays: [0.9]}
"""
SAME_GRID = ("model.resolution=32", "model.generator.patch=8", "model.discriminator.patch=8")
ANCHORED = ("model.generator.position_grid=4", "model.discriminator.position_grid=4")
TWICE = ("model.resolution=32", *ANCHORED)
FINER_PATCH = ("model.generator.patch=2", "model.discriminator.patch=2", *ANCHORED)


def job(*overrides: str) -> Config:
    return parse(JOB, "job.yaml", overrides)


def random_state(config: Config) -> dict[str, dict[str, Tensor]]:
    """Other weights in each tensor, so that each has an effect, and in each group."""
    torch.manual_seed(1)
    groups = {GENERATOR: build_generator(config), DISCRIMINATOR: build_discriminator(config)}
    groups |= {average_group(decay): groups[GENERATOR] for decay in config.optimisation.ema_decays}
    return {
        group: {
            name: value + 0.1 * torch.randn_like(value)
            for name, value in network.state_dict().items()
        }
        for group, network in groups.items()
    }


def moved(old: Config, new: Config, state: dict[str, dict[str, Tensor]]):
    """Both generators and both discriminators, the new ones with the old ones' weights."""
    made: dict[str, dict[str, Tensor]] = {group: {} for group in state}
    for rule in rules_between(old, new).rules:
        assert rule.source is not None
        made[rule.group][rule.tensor] = applied(rule, state[rule.source][rule.tensor])
    networks = []
    for config, weights in ((old, state), (new, made)):
        generator, discriminator = build_generator(config), build_discriminator(config)
        generator.load_state_dict(weights[GENERATOR])
        discriminator.load_state_dict(weights[DISCRIMINATOR])
        networks += [generator.eval(), discriminator.eval()]
    return networks


def upsampled(stages: Tensor, times: int) -> Tensor:
    return stages.repeat_interleave(times, -1).repeat_interleave(times, -2)


def at_more_pixels(times: int) -> Config:
    """The same grid of tokens at so many times the pixels on a side."""
    pixels = {"model.resolution": 16, "model.generator.patch": 4, "model.discriminator.patch": 4}
    return job(*(f"{key}={times * count}" for key, count in pixels.items()))


@torch.no_grad()
@pytest.mark.parametrize("times", [2, 4])
def test_on_the_same_grid_the_picture_is_the_old_one_with_each_pixel_repeated(times: int) -> None:
    old = job()
    new = at_more_pixels(times)
    before, _, after, _ = moved(old, new, random_state(old))
    z, labels = torch.randn(5, 64), torch.arange(5)
    assert torch.allclose(after(z, labels), upsampled(before(z, labels), times), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("times", [2, 4])
def test_on_the_same_grid_d_judges_a_picture_as_it_judged_its_averages(times: int) -> None:
    old = job()
    new = at_more_pixels(times)
    _, before, _, after = moved(old, new, random_state(old))
    pyramid = [torch.randn(5, 3, side, side) for side in new.model.scales()]
    pooled = [F.avg_pool2d(images, times) for images in pyramid]
    labels = torch.arange(5)
    assert torch.allclose(after(pyramid, labels)[0], before(pooled, labels)[0], atol=1e-4)


@pytest.mark.parametrize("changes", [TWICE, FINER_PATCH])
@torch.no_grad()
def test_on_a_finer_grid_a_picture_of_place_alone_is_the_same_picture_in_more_detail(
    changes: tuple[str, ...],
) -> None:
    # A generator whose blocks do nothing, and whose heads paint the sine of each pixel's row by the
    # sine and cosine of its token's: a picture that knows where it is, and nothing else.
    old, frequency = job(), 0.01
    state = random_state(old)
    weights, patch, width = state[GENERATOR], 4, 32
    for name, value in weights.items():
        if "modulation" in name or ".output." in name:
            value.zero_()
    quarter = width // 4
    which = int(
        torch.tensor([1e4 ** (-i / quarter) for i in range(quarter)]).sub(frequency).abs().argmin()
    )
    frequency = 1e4 ** (-which / quarter)
    offsets = (torch.arange(patch) + 0.5) / patch - 0.5
    rows = weights["heads.0.output.weight"].view(3, patch, patch, width)
    rows[..., which] = (frequency * offsets).cos()[None, :, None]
    rows[..., quarter + which] = (frequency * offsets).sin()[None, :, None]
    _, _, after, _ = moved(old, job(*changes), state)
    made = after(torch.randn(1, 64), torch.zeros(1, dtype=torch.long))[-1, 0, 0]
    # Rows are normalised to a mean square of one; sines and cosines have one of a half.
    side = len(made)
    places = (torch.arange(side) + 0.5) / side * 4 - 0.5
    expected = 2**0.5 * (frequency * places).sin()
    step = float(expected[1] - expected[0])
    assert torch.allclose(made, expected[:, None].expand(side, side), atol=0.05 * step)


@pytest.mark.parametrize("changes", [TWICE, FINER_PATCH, (*SAME_GRID, *ANCHORED)])
@torch.no_grad()
def test_a_flat_patch_is_embedded_as_before_and_a_flat_picture_painted_flat(
    changes: tuple[str, ...],
) -> None:
    old, new = job(), job(*changes)
    state = random_state(old)
    for name, value in state[GENERATOR].items():
        if ".output." in name and name.startswith("heads."):
            flat = value.view(3, 16, -1)
            flat.copy_(flat.mean(dim=1, keepdim=True).expand_as(flat))
    _, before, after, judge = moved(old, new, state)
    colour = torch.randn(3)
    widths = [
        network.patch_embedding(colour.repeat_interleave(patch**2))
        for network, patch in ((before, 4), (judge, new.model.discriminator.patch))
    ]
    assert torch.allclose(widths[0], widths[1], atol=1e-5)
    pictures = after(torch.randn(2, 64), torch.arange(2))[-1]
    patch = new.model.generator.patch
    assert torch.allclose(pictures, upsampled(F.avg_pool2d(pictures, patch), patch), atol=1e-5)


@pytest.mark.parametrize("changes", [(), SAME_GRID, TWICE, FINER_PATCH])
def test_every_tensor_has_one_rule_and_all_but_pixels_are_copied(changes: tuple[str, ...]) -> None:
    old, new = job(), job(*changes)
    found = rules_between(old, new)
    named = [(rule.group, rule.tensor) for rule in found.rules]
    assert sorted(named) == sorted((g, name) for g, own in shapes_of(new).items() for name in own)
    changed = {rule.tensor for rule in found.rules if rule.told != "copied"}
    pixels = {f"heads.{k}.output.{part}" for k in range(3) for part in ("weight", "bias")}
    if changes in ((), TWICE):
        pixels -= pixels if not changes else set()
        assert changed == pixels
    else:
        assert changed == pixels | {"patch_embedding.weight"}
    assert found.left_out == ()
    assert sum(count for _, _, count, _ in found.told()) == len(named)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("data.num_classes=11",), "data.num_classes is 10 there, 11 here"),
        (("model.channels=1",), "model.channels is 3 there, 1 here"),
        (("model.stages=2", "model.generator.size.depth=4"), "model.stages is 3 there, 2 here"),
        (("model.generator.size.width=64",), "generator.size is 3 blocks of width 32 with 2 heads"),
        (("model.discriminator.size.depth=3",), "model.discriminator.size is"),
        (("model.generator.latent_width=32",), "model.generator.latent_width is 64 there"),
        (("model.generator.mapping_lr_multiplier=1",), "mapping_lr_multiplier is 0.01 there"),
        (("model.discriminator.projection_width=64",), "projection_width is 32 there, 64 here"),
        (
            ("model.resolution=32",),
            "model.generator has 4 x 4 tokens there, 8 x 8 here: set "
            "model.generator.position_grid to 4",
        ),
        (
            (*SAME_GRID, "model.discriminator.position_grid=2"),
            "set model.discriminator.position_grid to 4",
        ),
        (
            ("model.resolution=24", "model.generator.patch=6", "model.discriminator.patch=6"),
            "model.generator.patch is 4 there, 6 here: set it to a multiple of 4",
        ),
        (
            ("model.resolution=8", "model.generator.patch=2", "model.discriminator.patch=2"),
            "pixels can't become fewer, set model.resolution to 16 or more",
        ),
        (("model.generator.patch=8",), "a grid can't become coarser"),
    ],
)
def test_what_cant_go_on_is_told_with_what_to_do(changes: tuple[str, ...], told: str) -> None:
    with pytest.raises(BadInput, match="can't go on from those weights") as caught:
        rules_between(job(), job(*changes))
    assert told in str(caught.value)


def test_all_reasons_are_told_at_once() -> None:
    with pytest.raises(BadInput) as caught:
        rules_between(job(), job("model.channels=1", "model.resolution=32"))
    told = str(caught.value)
    for words in ("model.channels", "model.generator has 4 x 4", "model.discriminator has 4 x 4"):
        assert words in told


def test_of_a_wholly_other_job_the_first_differences_are_told() -> None:
    other = job(
        "model.channels=1",
        "model.discriminator.projection_width=16",
        "data.num_classes=7",
        "model.generator.latent_width=5",
        "model.discriminator.scope=aggregated",
    )
    with pytest.raises(BadInput) as caught:
        rules_between(job(), other)
    assert " and 1 more: set what differs as it was" in str(caught.value)


def test_an_average_that_is_new_begins_at_the_weights() -> None:
    found = rules_between(job(), job("optimisation.ema_decays=[0.9, 0.99]"))
    sources = {rule.group: rule.source for rule in found.rules}
    assert sources[average_group(0.9)] == average_group(0.9)
    assert sources[average_group(0.99)] == GENERATOR
    (told,) = {rule.told for rule in found.rules if rule.group == average_group(0.99)}
    assert "no such average" in told


def test_the_teachers_projector_comes_and_goes() -> None:
    aligned = job("objective.alignment.weight=1")
    begun = rules_between(job(), aligned)
    at_random = {rule.tensor for rule in begun.rules if rule.source is None}
    assert at_random and all(name.startswith("projector.") for name in at_random)
    assert set(rules_between(aligned, job()).left_out) == at_random


def test_tensors_that_are_not_as_the_configuration_says_are_refused() -> None:
    old, new = job(), job()
    shapes = {group: dict(tensors) for group, tensors in shapes_of(old).items()}
    shapes[DISCRIMINATOR]["cls"] = (3, 16)
    with pytest.raises(BadInput, match=r"discriminator cls can't be continued: \(3, 16\) there"):
        transfer(old, new, shapes, shapes_of(new))
    del shapes[DISCRIMINATOR]["cls"]
    with pytest.raises(BadInput, match="cls can't be continued: missing there"):
        transfer(old, new, shapes, shapes_of(new))
    shapes = {group: dict(tensors) for group, tensors in shapes_of(old).items()}
    shapes[GENERATOR]["surprise"] = (1,)
    with pytest.raises(BadInput, match="no place for surprise"):
        transfer(old, new, shapes, shapes_of(new))


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (repeated(2, 4), ((1, 0), (1, 0), (0, 1), (0, 1))),
        (sampled(2, 2, 0.5), ((0.75, 0.25), (0.25, 0.75))),
        (sampled(1, 2, 0.5), ((1,), (1,))),
        (sampled(4, 2, 0.5), ((0, 1, 0, 0), (0, 0, 1, 0))),
        (stretched(1, 2), ((0.5,), (0.5,))),
        (stretched(4, 2), ((1, 1, 0, 0), (0, 0, 1, 1))),
    ],
)
def test_the_rules_of_one_axis(axis, expected) -> None:
    assert axis == expected


@pytest.mark.parametrize("old", [1, 2, 4, 8])
@pytest.mark.parametrize("new", [1, 2, 4, 8])
def test_parts_add_up(old: int, new: int) -> None:
    assert torch.tensor(sampled(old, new, 0.25)).sum(1) == pytest.approx(torch.ones(new))
    assert torch.tensor(stretched(old, new)).sum(0) == pytest.approx(torch.ones(old))
