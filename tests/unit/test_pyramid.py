"""The image pyramid: average pooling, the same for reals and fakes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cat_ray.objective.pyramid import pool, real_pyramid, stage_pyramid

few = settings(max_examples=20, deadline=None, derandomize=True)
SCALES = (4, 8, 16, 32)


def random(*shape: int) -> Tensor:
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=numbers, dtype=torch.float64)


@few
@given(
    side=st.integers(1, 4), first=st.sampled_from([1, 2, 3, 4]), second=st.sampled_from([1, 2, 4])
)
def test_pooling_in_two_steps_equals_pooling_in_one(side, first, second):
    images = random(2, 3, side * first * second, side * first * second)
    in_two = pool(pool(images, side * second), side)
    torch.testing.assert_close(in_two, pool(images, side))


@pytest.mark.parametrize("side", [4, 8, 16])
def test_halving_is_the_mean_of_two_by_two_blocks(side):
    images = random(2, 4, 32, 32)
    halved = images
    while halved.shape[-1] > side:
        rows = halved[..., 0::2, :] + halved[..., 1::2, :]
        halved = (rows[..., 0::2] + rows[..., 1::2]) / 4
    torch.testing.assert_close(pool(images, side), halved)


def test_every_pixel_counts_and_counts_the_same():
    images = torch.zeros(1, 1, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(pool(images, 4).sum(), images)
    assert (gradient == 1 / 64).all()


@few
@given(side=st.integers(1, 5), factor=st.sampled_from([1, 2, 3, 4, 8]))
def test_the_mean_of_each_channel_is_kept(side, factor):
    images = random(2, 3, side * factor, side * factor)
    torch.testing.assert_close(pool(images, side).mean(dim=(2, 3)), images.mean(dim=(2, 3)))


def test_a_real_image_appears_at_every_scale_coarse_to_fine():
    images = random(2, 4, 32, 32)
    pyramid = real_pyramid(images, SCALES)
    assert [level.shape for level in pyramid] == [(2, 4, side, side) for side in SCALES]
    assert torch.equal(pyramid[-1], images)
    for level, side in zip(pyramid, SCALES, strict=True):
        assert torch.equal(level, pool(images, side))


def test_stage_k_appears_at_scale_k_and_nowhere_else():
    outputs = random(4, 2, 3, 32, 32)
    pyramid = stage_pyramid(outputs, SCALES)
    assert [level.shape for level in pyramid] == [(2, 3, side, side) for side in SCALES]
    for level, output, side in zip(pyramid, outputs, SCALES, strict=True):
        assert torch.equal(level, pool(output, side))


def test_equal_stages_look_like_a_real_image():
    images = random(2, 3, 32, 32)
    as_fake = stage_pyramid(images.expand(4, -1, -1, -1, -1), SCALES)
    for fake, real in zip(as_fake, real_pyramid(images, SCALES), strict=True):
        assert torch.equal(fake, real)


@pytest.mark.parametrize("stages", [3, 5])
def test_as_many_stages_as_scales_are_demanded(stages):
    with pytest.raises(ValueError, match="zip"):
        stage_pyramid(random(stages, 2, 3, 32, 32), SCALES)
