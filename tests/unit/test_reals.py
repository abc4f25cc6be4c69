"""From a batch's bytes to what the networks see: pixels, stored latents, or latents on the fly.

The VAE has random weights. It comes from diffusers, so tests that need it are skipped where it
isn't installed.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cat_ray.config import Config, parse
from cat_ray.data.latents import load_vae
from cat_ray.data.read import Batch, Reading
from cat_ray.errors import BadInput
from cat_ray.storage import locate
from cat_ray.training.draws import draw_step
from cat_ray.training.reals import RealsMaker

CPU = torch.device("cpu")
IMAGES = Reading(locate("."), "images", 32, 3, crop=False, num_classes=10)
LATENTS = replace(IMAGES, contents="latents", resolution=8, channels=4, scaling_factor=0.25)
JOB = """
run: {folder: somewhere, total_images: 64}
data: {shards: elsewhere, num_classes: 10}
model:
  channels: 4
  resolution: 32
  generator: {size: {depth: 4, width: 32, heads: 2}, patch: 4}
  discriminator: {size: {depth: 2, width: 32, heads: 2}, patch: 4}
optimisation: {batch_size: 8, lanes: 4}
"""


def job(*changes: str) -> Config:
    return parse(JOB, "job", changes)


def batch(reading: Reading, size: int = 4) -> Batch:
    found, random = Batch.empty(reading, size), np.random.default_rng(0)
    if reading.contents == "images":
        found.content[:] = random.integers(0, 256, found.content.shape)
    else:
        found.content[:] = random.normal(size=found.content.shape)
    return found


def noise(size: int, side: int) -> Tensor:
    return torch.randn(size, 4, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vae(tmp_path: Path) -> str:
    """A folder with a tiny VAE of random weights."""
    diffusers = pytest.importorskip("diffusers", reason="needs pip install '.[vae]'")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        scaling_factor=0.25,
    ).save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


# Pixels.


def test_pixels_are_images_and_pictures_between_minus_one_and_one():
    maker, given = RealsMaker(job(), IMAGES, CPU), batch(IMAGES)
    given.content[0, 0, 0], given.content[0, 0, 1] = 0, 255
    reals = maker(given, None)
    assert not maker.are_latents
    assert maker.codec is None
    expected = torch.from_numpy(given.content).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(reals.images, expected)
    assert reals.pictures is not None
    assert torch.equal(reals.pictures, reals.images)
    assert (reals.images[0, :, 0, 0] == -1).all()
    assert (reals.images[0, :, 0, 1] == 1).all()


def test_reals_do_not_change_when_the_batch_is_overwritten():
    # A window's memory is used again for the next one.
    for reading, posterior in ((IMAGES, None), (LATENTS, noise(4, 8))):
        given = batch(reading)
        reals = RealsMaker(job(), reading, CPU)(given, posterior)
        before = reals.images.clone()
        given.content[:] = 0
        assert torch.equal(reals.images, before)


# Stored latents.


def test_stored_latents_are_drawn_from_their_posterior_and_scaled():
    maker, given, drawn = RealsMaker(job(), LATENTS, CPU), batch(LATENTS), noise(4, 8)
    reals = maker(given, drawn)
    assert maker.are_latents
    mean, std = torch.from_numpy(given.content[:, :4]), torch.from_numpy(given.content[:, 4:])
    torch.testing.assert_close(reals.images, (mean.float() + std.float() * drawn) * 0.25)
    assert reals.images.dtype == torch.float32
    assert reals.pictures is None


def test_without_noise_a_latent_is_its_mean_and_without_deviation_the_noise_is_none():
    maker, given = RealsMaker(job(), LATENTS, CPU), batch(LATENTS)
    mean = torch.from_numpy(given.content[:, :4]).float() * 0.25
    torch.testing.assert_close(maker(given, torch.zeros(4, 4, 8, 8)).images, mean)
    given.content[:, 4:] = 0
    torch.testing.assert_close(maker(given, noise(4, 8)).images, mean)


def test_alignment_on_stored_latents_is_refused_with_what_to_do():
    config = job("objective.alignment.weight=0.5")
    with pytest.raises(BadInput, match=r"objective\.alignment needs the images.*latents only"):
        RealsMaker(config, LATENTS, CPU)
    RealsMaker(config, IMAGES, CPU)


# Latents on the fly.


def test_images_are_encoded_to_scaled_latents_of_the_vae(vae):
    maker, given, drawn = (
        RealsMaker(job(f"latents.vae={vae}"), IMAGES, CPU),
        batch(IMAGES),
        noise(4, 4),
    )
    reals = maker(given, drawn)
    assert maker.are_latents
    codec = load_vae(vae)
    pictures = torch.from_numpy(given.content).permute(0, 3, 1, 2) / 127.5 - 1
    mean, std = codec.encode(pictures)
    torch.testing.assert_close(reals.images, (mean + std * drawn) * 0.25)
    # The teacher sees the pixels.
    assert reals.pictures is not None
    torch.testing.assert_close(reals.pictures, pictures)
    assert not reals.images.requires_grad


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_lane_is_encoded_to_the_same_bits_whoever_does_it(vae, lanes):
    maker = RealsMaker(job(f"latents.vae={vae}"), IMAGES, CPU)
    whole, drawn = batch(IMAGES, size=8), noise(8, 4)
    together = maker(whole, drawn).images
    size = 2 * lanes
    for first in range(0, 8, size):
        own = maker(whole.rows(first, first + size), drawn[first : first + size]).images
        assert torch.equal(own, together[first : first + size])


def test_stored_latents_are_those_that_the_vae_gives_on_the_fly(vae):
    images, drawn = batch(IMAGES), noise(4, 4)
    codec = load_vae(vae)
    mean, std = codec.encode(torch.from_numpy(images.content).permute(0, 3, 1, 2) / 127.5 - 1)
    stored = replace(LATENTS, resolution=4)
    given = Batch.empty(stored, 4)
    given.content[:] = torch.cat([mean, std], dim=1).half().numpy()
    found = RealsMaker(job(), stored, CPU)(given, drawn).images
    expected = RealsMaker(job(f"latents.vae={vae}"), IMAGES, CPU)(images, drawn).images
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


# The noise.


def test_the_posteriors_noise_is_drawn_only_for_latents_and_moves_no_other_draw():
    plain = draw_step(job(), range(4), 3, CPU)
    latent = draw_step(job(), range(4), 3, CPU, posterior=True)
    assert plain.posterior is None
    assert latent.posterior is not None
    assert latent.posterior.shape == (8, 4, 32, 32)
    assert torch.equal(plain.latents, latent.latents)
    for mine, others in zip(plain.noise_real, latent.noise_real, strict=True):
        assert torch.equal(mine, others)


def test_a_lanes_noise_does_not_depend_on_who_draws_it():
    whole = draw_step(job(), range(4), 3, CPU, posterior=True).posterior
    parts = [draw_step(job(), range(n, n + 2), 3, CPU, posterior=True).posterior for n in (0, 2)]
    assert whole is not None and all(part is not None for part in parts)
    assert torch.equal(whole, torch.cat([part for part in parts if part is not None]))
    other = draw_step(job(), range(4), 4, CPU, posterior=True).posterior
    assert other is not None and not torch.equal(whole, other)
