"""DiffAugment as a function of its draws."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cat_ray.objective.augment import (
    AugmentDraws,
    augment,
    augment_stages,
    concatenate,
    draw,
    move,
)
from cat_ray.objective.settings import AugmentPolicy

few = settings(max_examples=30, deadline=None, derandomize=True)
SIDE = 32
NAMES = [field.name for field in fields(AugmentDraws)]
NOTHING = AugmentPolicy(color=0, translation=0, cutout=0, flip=0)
EVERYTHING = AugmentPolicy(color=1, translation=0.25, cutout=0.5, flip=0.5)


def numbers(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_images(images: int, side: int, channels: int = 3) -> Tensor:
    return torch.from_numpy(numbers(0).standard_normal((images, channels, side, side)))


def still(images: int = 1) -> AugmentDraws:
    """Draws that change nothing: a test sets the one it is about."""
    return draw(NOTHING, images, SIDE, numbers(0))


@pytest.mark.parametrize("side", [1, 4, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_policy_of_zeros_changes_nothing(side, dtype):
    images = random_images(4, side).to(dtype)
    same = augment(images, draw(NOTHING, 4, SIDE, numbers(1)), NOTHING)
    assert same.dtype == dtype
    # Taking out the mean and putting it back costs a rounding.
    torch.testing.assert_close(same, images, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("policy", [AugmentPolicy(), EVERYTHING])
def test_an_augmentation_repeats_from_its_draws_and_differs_between_draws(policy):
    images = random_images(4, 16)
    first, second = (draw(policy, 4, SIDE, numbers(seed)) for seed in (1, 2))
    assert torch.equal(augment(images, first, policy), augment(images, first, policy))
    assert not torch.equal(augment(images, first, policy), augment(images, second, policy))


def test_all_stages_of_an_image_get_that_images_augmentation():
    outputs = torch.stack([random_images(3, 16) + stage for stage in range(4)])
    draws = draw(EVERYTHING, 3, SIDE, numbers(1))
    together = augment_stages(outputs, draws, EVERYTHING)
    alone = torch.stack([augment(output, draws, EVERYTHING) for output in outputs])
    assert torch.equal(together, alone)
    same = augment_stages(outputs[:1].expand(4, -1, -1, -1, -1), draws, EVERYTHING)
    assert torch.equal(same, same[:1].expand_as(same))


@few
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_augmenting_batches_as_one_equals_augmenting_each(counts, seed):
    batches = list(random_images(sum(counts), 8).split(counts))
    draws = [draw(EVERYTHING, count, SIDE, numbers(seed + i)) for i, count in enumerate(counts)]
    together = augment(torch.cat(batches), concatenate(draws), EVERYTHING)
    alone = [augment(b, d, EVERYTHING) for b, d in zip(batches, draws, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_an_image_does_not_see_its_neighbours():
    images = random_images(3, 8)
    draws = draw(EVERYTHING, 3, SIDE, numbers(1))
    before = augment(images, draws, EVERYTHING)
    images[1] += 1.0
    after = augment(images, draws, EVERYTHING)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


def moved_pixel_by_pixel(image: Tensor, rows: int, columns: int, flip: bool) -> Tensor:
    side = image.shape[-1]
    result = torch.zeros_like(image)
    for row in range(side):
        for column in range(side):
            from_row, from_column = row - rows, column - columns
            if 0 <= from_row < side and 0 <= from_column < side:
                if flip:
                    from_column = side - 1 - from_column
                result[:, row, column] = image[:, from_row, from_column]
    return result


shifts = st.integers(-9, 9)


@few
@given(rows=shifts, columns=shifts, flip=st.booleans(), side=st.sampled_from([5, 8, 9]))
def test_move_flips_then_shifts_by_whole_pixels_and_fills_with_zeros(rows, columns, flip, side):
    image = random_images(1, side)
    draws = replace(
        still(),
        shift_rows=torch.tensor([rows / side]),
        shift_columns=torch.tensor([columns / side]),
        flip=torch.tensor([flip]),
    )
    expected = moved_pixel_by_pixel(image[0], rows, columns, flip)
    assert torch.equal(move(image, draws)[0], expected)


@few
@given(
    rows=shifts,
    columns=shifts,
    flip=st.booleans(),
    side=st.sampled_from([8, 16]),
    factor=st.sampled_from([2, 3, 8]),
)
def test_a_larger_image_moves_in_proportion(rows, columns, flip, side, factor):
    image = random_images(1, side)
    draws = replace(
        still(),
        shift_rows=torch.tensor([rows / side]),
        shift_columns=torch.tensor([columns / side]),
        flip=torch.tensor([flip]),
    )

    def enlarge(images: Tensor) -> Tensor:
        return F.interpolate(images, scale_factor=factor, mode="nearest")

    assert torch.equal(move(enlarge(image), draws), enlarge(move(image, draws)))


@pytest.mark.parametrize(("shift", "pixels"), [(0.06, 0), (0.07, 1), (-0.06, 0), (-0.07, -1)])
def test_a_shift_between_pixels_goes_to_the_nearest(shift, pixels):
    image = random_images(1, 8)
    draws = replace(still(), shift_rows=torch.tensor([shift]))
    assert torch.equal(move(image, draws)[0], moved_pixel_by_pixel(image[0], pixels, 0, False))


@few
@given(
    row=st.floats(0, 1, exclude_max=True, width=32),
    column=st.floats(0, 1, exclude_max=True, width=32),
    share=st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.6, 1.0]),
    side=st.sampled_from([7, 8, 16]),
)
def test_cutout_blanks_one_rectangle_no_larger_than_the_stated_square(row, column, share, side):
    images = torch.ones(1, 2, side, side)
    draws = replace(still(), cut_row=torch.tensor([row]), cut_column=torch.tensor([column]))
    result = augment(images, draws, replace(NOTHING, cutout=share))[0]
    assert torch.equal(result[0], result[1])
    hole = result[0] == 0
    assert (result[0][~hole] - 1).abs().max() < 1e-6 if (~hole).any() else share == 1
    rows, columns = hole.any(dim=1), hole.any(dim=0)
    assert torch.equal(hole, rows[:, None] & columns[None, :])
    length = round(share * side)
    for span, centre in ((rows, row), (columns, column)):
        inside = span.nonzero().flatten().tolist()
        assert inside == list(range(inside[0], inside[0] + len(inside))) if inside else not length
        # At least half of the square lies inside the image, and all of it when centred there.
        assert length // 2 <= len(inside) <= length
        if length / 2 + 1 <= centre * side <= side - length / 2 - 1:
            assert len(inside) == length


@pytest.mark.parametrize(("side", "share"), [(8, 0.5), (8, 0.375), (7, 0.5), (7, 0.4)])
def test_cutout_favours_no_side(side, share):
    images = 1000
    middles = (torch.arange(images) + 0.5) / images
    draws = replace(still(images), cut_row=middles, cut_column=middles)
    kept = augment(torch.ones(images, 1, side, side), draws, replace(NOTHING, cutout=share))
    often = kept.mean(dim=(0, 1))
    torch.testing.assert_close(often, often.rot90(2), rtol=0, atol=0.01)
    torch.testing.assert_close(often, often.mT, rtol=0, atol=0)


def test_brightness_adds_the_same_to_every_pixel():
    images = random_images(2, 4)
    draws = replace(still(2), brightness=torch.tensor([0.5, -0.25]))
    expected = images + torch.tensor([0.5, -0.25], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(augment(images, draws, NOTHING), expected)


def test_saturation_scales_what_sets_a_pixels_channels_apart():
    images = random_images(2, 4)
    result = augment(images, replace(still(2), saturation=torch.tensor([0.0, 1.5])), NOTHING)
    grey = images.mean(dim=1, keepdim=True)
    torch.testing.assert_close(result[0], grey[0].expand(3, -1, -1))
    torch.testing.assert_close(result[1], grey[1] + 1.5 * (images[1] - grey[1]))


def test_contrast_scales_the_distance_from_the_images_own_mean():
    images = random_images(2, 4)
    result = augment(images, replace(still(2), contrast=torch.tensor([0.5, 1.5])), NOTHING)
    for image, changed, factor in zip(images, result, (0.5, 1.5), strict=True):
        torch.testing.assert_close(changed, image.mean() + factor * (image - image.mean()))


def test_what_is_shifted_in_or_cut_out_stays_zero_whatever_the_colour():
    images = random_images(1, 8) + 5.0
    draws = replace(
        still(),
        brightness=torch.tensor([0.5]),
        contrast=torch.tensor([1.5]),
        shift_rows=torch.tensor([0.25]),
        cut_row=torch.tensor([0.5]),
        cut_column=torch.tensor([0.5]),
    )
    result = augment(images, draws, replace(NOTHING, cutout=0.5))[0]
    zero = torch.zeros(8, 8, dtype=torch.bool)
    zero[:2] = True
    zero[2:6, 2:6] = True
    assert torch.equal((result == 0).all(dim=0), zero)
    assert (result[:, ~zero] != 0).all()


def test_the_gradient_is_right_and_reaches_every_image():
    images = random_images(3, 6, channels=2).requires_grad_()
    draws = draw(EVERYTHING, 3, SIDE, numbers(5))
    assert torch.autograd.gradcheck(lambda x: augment(x, draws, EVERYTHING), (images,))
    (gradient,) = torch.autograd.grad(augment(images, draws, EVERYTHING).square().sum(), images)
    assert gradient.flatten(1).any(dim=1).all()


def test_moving_only_drops_the_gradient_of_what_leaves_the_image():
    images = random_images(1, 4).requires_grad_()
    draws = replace(still(), shift_columns=torch.tensor([0.25]))
    (gradient,) = torch.autograd.grad(move(images, draws).sum(), images)
    expected = torch.ones(1, 3, 4, 4, dtype=torch.float64)
    expected[..., 3] = 0
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("switch", [field.name for field in fields(AugmentPolicy)])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_switch_of_the_policy_changes_its_own_draws_and_no_other(switch, value):
    own = {
        "color": {"brightness", "saturation", "contrast"},
        "translation": {"shift_rows", "shift_columns"},
        "cutout": set(),
        "flip": {"flip"},
    }[switch]
    one, other = numbers(3), numbers(3)
    before = draw(AugmentPolicy(), 64, SIDE, one)
    after = draw(replace(AugmentPolicy(), **{switch: value}), 64, SIDE, other)
    changed = {n for n in NAMES if not torch.equal(getattr(before, n), getattr(after, n))}
    assert changed == own
    # What is drawn next from the same stream is the same too.
    assert (one.random(4) == other.random(4)).all()


def test_draws_come_from_the_given_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draw(EVERYTHING, 8, SIDE, numbers(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    second = draw(EVERYTHING, 8, SIDE, numbers(1))
    assert all(torch.equal(getattr(first, n), getattr(second, n)) for n in NAMES)


def test_draws_are_within_their_ranges_and_as_frequent_as_the_policy_says():
    images = 10_000
    policy = AugmentPolicy(color=0.5, translation=0.125, flip=0.4)
    draws = draw(policy, images, SIDE, numbers(1))
    ranges = {
        "brightness": (-0.5, 0.5),
        "saturation": (0.0, 2.0),
        "contrast": (0.5, 1.5),
        "shift_rows": (-0.125, 0.125),
        "shift_columns": (-0.125, 0.125),
        "cut_row": (0.0, 1.0),
        "cut_column": (0.0, 1.0),
    }
    for name, (low, high) in ranges.items():
        values = getattr(draws, name)
        span = high - low
        assert low <= values.min() < low + 0.01 * span
        assert high - 0.01 * span < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * span)
    # Six deviations of a share of 10,000.
    untouched = {"brightness": 0.0, "saturation": 1.0, "contrast": 1.0}
    for name, value in untouched.items():
        share = (getattr(draws, name) != value).float().mean().item()
        assert share == pytest.approx(policy.color, abs=0.03)
    assert draws.flip.float().mean().item() == pytest.approx(policy.flip, abs=0.03)


def test_shifts_are_whole_pixels_each_as_likely_as_another():
    draws = draw(AugmentPolicy(translation=0.125), 9_000, SIDE, numbers(1))
    for shift in (draws.shift_rows, draws.shift_columns):
        pixels, counts = (shift * SIDE).unique(return_counts=True)
        assert pixels.tolist() == list(range(-4, 5))
        # Six deviations of a count of 1,000.
        assert (counts - 1_000).abs().max() < 180


def test_the_draws_of_an_image_are_independent():
    draws = draw(AugmentPolicy(), 10_000, SIDE, numbers(1))
    columns = [getattr(draws, name) for name in NAMES]
    columns += [draws.brightness != 0, draws.saturation != 1, draws.contrast != 1]
    table = torch.stack([column.double() for column in columns])
    correlation = table.corrcoef() - torch.eye(len(table), dtype=torch.float64)
    # Six deviations of the correlation of 10,000 pairs.
    assert correlation.abs().max() < 0.06


def test_draws_move_to_a_device_all_together():
    moved = still(2).each(lambda values: values.to("meta"))
    assert {getattr(moved, name).device.type for name in NAMES} == {"meta"}
