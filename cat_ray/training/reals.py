"""From a batch's bytes to the reals of a step: images, or a draw of their latents."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cat_ray.config import Config
from cat_ray.data.latents import LatentCodec, load_vae
from cat_ray.data.read import Batch, Reading
from cat_ray.errors import BadInput
from cat_ray.evaluation.sampling import to_unit
from cat_ray.training.parts import part
from cat_ray.training.placement import to_device


@dataclass(frozen=True)
class Reals:
    """What a micro-batch shows.

    Attributes:
        images: as the networks see them: `[n, c, R, R]`, pixels in [-1, 1] or scaled latents.
        pictures: as the teacher sees them: `[n, c, S, S]` in [-1, 1], or None where there are only
            latents.
    """

    images: Tensor
    pictures: Tensor | None


class RealsMaker:
    """Turns batches into reals on the device; holds the VAE where images are to be encoded."""

    def __init__(self, config: Config, reading: Reading, device: torch.device):
        self._device, self._reading = device, reading
        self._lane_size = config.optimisation.lane_size
        self.codec = _load_codec(config, device)
        self.are_latents = reading.contents == "latents" or self.codec is not None
        if reading.contents == "latents" and config.objective.alignment.weight:
            raise BadInput(
                "objective.alignment needs the images, the shards hold latents only: train on "
                "shards of images with latents.vae, or set objective.alignment.weight to 0"
            )

    @part("batch to device")
    def __call__(self, batch: Batch, posterior: Tensor | None) -> Reals:
        """The reals of a batch; `posterior` is the noise of its latents."""
        content = to_device(torch.from_numpy(batch.content), self._device)
        if self._reading.contents == "images":
            pictures = to_unit(content.permute(0, 3, 1, 2))
            if self.codec is None or posterior is None:
                return Reals(pictures, pictures)
            # A lane at a time: the same bits, whoever computes it.
            parts = [self.codec.encode(lane) for lane in pictures.split(self._lane_size)]
            mean, std = (torch.cat(each) for each in zip(*parts, strict=True))
            return Reals(self.codec.scale(mean, std, posterior), pictures)
        mean, std = content.float().chunk(2, dim=1)
        assert posterior is not None
        return Reals((mean + std * posterior) * self._reading.scaling_factor, None)


def _load_codec(config: Config, device: torch.device) -> LatentCodec | None:
    latents = config.latents
    if latents.vae is None:
        return None
    codec = load_vae(latents.vae, latents.revision).to(device)
    if config.optimisation.compile:
        # It sees a lane at a time: always the same shape.
        codec.vae.encoder.compile()
    return codec
