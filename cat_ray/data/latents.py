"""Pictures to the latents of Stable Diffusion's VAE and back."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cat_ray.data.latent_shape import CHANNELS, REDUCTION
from cat_ray.errors import BadInput
from cat_ray.pretrained import kind_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class LatentCodec(nn.Module):
    """A frozen VAE. What its encoder gives is unscaled; networks train on scaled latents."""

    def __init__(self, vae: "AutoencoderKL"):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.scaling_factor: float = vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of each image, in the VAE's own space.

        Args:
            images: `[B, 3, S, S]` in [-1, 1], S a multiple of 8.

        Returns:
            Mean and standard deviation, `[B, 4, S / 8, S / 8]` each.
        """
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean, posterior.std

    def scale(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior as the networks take it, all `[B, 4, S / 8, S / 8]`.

        Args:
            mean: of the posterior, unscaled.
            std: of the posterior, unscaled.
            noise: standard normal.
        """
        return (mean + std * noise) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents `[B, 4, S / 8, S / 8]` to images `[B, 3, S, S]` in [-1, 1]."""
        return self.vae.decode(latents / self.scaling_factor).sample.clamp(-1, 1)


def load_vae(name: str, revision: str | None = None) -> LatentCodec:
    """Loads an AutoencoderKL by local folder or hub name.

    Args:
        name: a folder with `config.json` and safetensors weights, or a hub name such as
            `stabilityai/sd-vae-ft-mse`.
        revision: the hub's branch, tag or commit.

    Raises:
        BadInput: diffusers isn't installed, or the VAE can't be loaded or has other latents than
            4 channels at an eighth of the side.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise BadInput("latents need diffusers: pip install '.[vae]'") from error
    kind = kind_of(name)
    try:
        # Without accelerate, which nothing else here needs, there is only the plain way to load.
        vae, found = AutoencoderKL.from_pretrained(
            name,
            revision=revision,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    # A configuration or weights of another kind of model end in the last two.
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise BadInput(f"can't load the VAE from the {kind} {name}: {error}") from error
    # Diffusers would go on with random weights in their place.
    if found["missing_keys"]:
        raise BadInput(
            f"can't load the VAE from the {kind} {name}: "
            f"{len(found['missing_keys'])} weights are missing, {found['missing_keys'][0]} is one"
        )
    channels, reduction = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if (channels, reduction) != (CHANNELS, REDUCTION):
        raise BadInput(
            f"the VAE {name} has latents of {channels} channels at 1/{reduction} of the side, "
            f"not {CHANNELS} at 1/{REDUCTION}"
        )
    return LatentCodec(vae)
