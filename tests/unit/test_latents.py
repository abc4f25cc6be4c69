"""Latents against the AutoencoderKL called directly, with a tiny one of random weights.

Diffusers is not part of the test extra: these tests are skipped where it isn't installed, all
but the one about its absence.
"""

import json
import sys

import pytest
import torch

from cat_ray.data.latents import LatentCodec, load_vae
from cat_ray.errors import BadInput

SCALING_FACTOR = 0.25
SIDE = 32


def tiny_vae(blocks=4, **settings):
    diffusers = pytest.importorskip("diffusers", reason="needs pip install '.[vae]'")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        **{"scaling_factor": SCALING_FACTOR, **settings},
    ).eval()


@pytest.fixture
def vae():
    return tiny_vae()


@pytest.fixture
def folder(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def codec(folder):
    return load_vae(str(folder))


@pytest.fixture
def images():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_latents(count=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 4, SIDE // 8, SIDE // 8, generator=generator)


@torch.no_grad()
def test_encoding_gives_the_posterior_of_the_vae_unscaled(codec, vae, images):
    posterior = vae.encode(images).latent_dist
    mean, std = codec.encode(images)
    assert mean.shape == std.shape == (2, 4, SIDE // 8, SIDE // 8)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.logvar.exp().sqrt())


@torch.no_grad()
def test_decoding_undoes_the_scale_and_asks_the_vae(codec, vae):
    latents = random_latents()
    images = codec.decode(latents * SCALING_FACTOR)
    assert images.shape == (2, 3, SIDE, SIDE)
    torch.testing.assert_close(images, vae.decode(latents).sample.clamp(-1, 1))


@torch.no_grad()
def test_decoded_images_keep_to_their_range(codec):
    torch.nn.init.constant_(codec.vae.decoder.conv_out.bias, 3.0)
    assert codec.decode(random_latents()).max() == 1
    torch.nn.init.constant_(codec.vae.decoder.conv_out.bias, -3.0)
    assert codec.decode(random_latents()).min() == -1


@torch.no_grad()
def test_a_draw_of_the_posterior_comes_back_as_the_vaes_own(codec, vae, images):
    posterior = vae.encode(images).latent_dist
    noise = random_latents()
    latents = codec.scale(*codec.encode(images), noise)
    drawn = posterior.mean + posterior.std * noise
    torch.testing.assert_close(latents, drawn * SCALING_FACTOR)
    torch.testing.assert_close(codec.decode(latents), vae.decode(drawn).sample.clamp(-1, 1))


def test_a_configuration_without_a_factor_means_stable_diffusions(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["scaling_factor"]
    (folder / "config.json").write_text(json.dumps(config))
    one = torch.ones(())
    assert load_vae(str(folder)).scale(one, one, one) == pytest.approx(2 * 0.18215)


def test_the_codec_is_frozen_and_keeps_no_graph(vae, images):
    codec = LatentCodec(vae.train())
    assert not any(module.training for module in codec.vae.modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    noise = random_latents().requires_grad_()
    assert not codec.decode(codec.scale(*codec.encode(images), noise)).requires_grad


def test_without_diffusers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BadInput, match=r"pip install '\.\[vae\]'"):
        load_vae("anything")


@pytest.mark.parametrize("damage", ["no weights", "pickled", "cut short", "not JSON"])
def test_a_vae_that_cannot_be_read_is_bad_input(vae, folder, damage):
    weights = folder / "diffusion_pytorch_model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "pickled":
        weights.unlink()
        vae.save_pretrained(folder, safe_serialization=False)
    elif damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        (folder / "config.json").write_text("{")
    with pytest.raises(BadInput, match=f"can't load the VAE from the .*folder {folder}: "):
        load_vae(str(folder))


@pytest.mark.parametrize("name", ["/absent/vae", "./vae", "../vae", "~/vae"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(BadInput, match=f"there is no folder {name} to load a model from"):
        load_vae(name)


def test_the_hub_is_asked_for_the_revision(monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="needs pip install '.[vae]'")

    def refuse(name, *, revision, **_):
        raise ValueError(f"no {revision} of {name}")

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", refuse)
    with pytest.raises(BadInput, match="hub name or folder lab/vae: no v1 of lab/vae"):
        load_vae("lab/vae", "v1")


@pytest.mark.parametrize("other", [{"layers_per_block": 2}, {"latent_channels": 8}])
def test_weights_that_do_not_fit_the_configuration_are_bad_input(folder, tmp_path, other):
    tiny_vae(**other).save_pretrained(tmp_path / "other")
    (folder / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
    with pytest.raises(BadInput, match=f"can't load the VAE from the folder {folder}: "):
        load_vae(str(folder))


def test_another_kind_of_model_is_bad_input(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs pip install '.[vae]'")
    diffusers.UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    ).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="can't load the VAE"):
        load_vae(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"latent_channels": 8}, "8 channels at 1/8 of the side, not 4 at 1/8"),
        ({"blocks": 3}, "4 channels at 1/4 of the side, not 4 at 1/8"),
    ],
)
def test_latents_of_another_shape_are_refused(tmp_path, settings, told):
    tiny_vae(**settings).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=told):
        load_vae(str(tmp_path))
