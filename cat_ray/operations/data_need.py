"""What a run asks of the storage that its shards are on."""

from dataclasses import dataclass

from cat_ray.config import Config
from cat_ray.data.index import INDEX_NAME, read_index
from cat_ray.data.latent_shape import CHANNELS, REDUCTION

HALF_BYTES = 2
# A JPEG of 256 x 256, cut from photographs: 24 KB (README, "Data").
JPEG_BYTES_PER_PIXEL = 24_000 / 256**2


@dataclass(frozen=True)
class DataNeed:
    """Images and bytes per second that all workers take together, None where no rate is known.

    `source` tells where `bytes_per_image` comes from.
    """

    images_per_second: float | None
    bytes_per_image: float
    source: str

    @property
    def bytes_per_second(self) -> float | None:
        """Of the shards, without any cache."""
        if self.images_per_second is None:
            return None
        return self.images_per_second * self.bytes_per_image


def data_need(config: Config, images_per_second: float | None) -> DataNeed:
    """What so many images per second take; shards that lie on this machine are looked at."""
    storage = config.storage
    folder = storage.locate(config.data.shards)
    if folder.local_path is not None and (folder / INDEX_NAME).exists():
        index = read_index(folder)
        size = sum(shard.bytes for shard in index.shards) / index.images
        return DataNeed(images_per_second, size, f"the index of {config.data.shards}")
    model = config.model
    if model.channels == CHANNELS and config.latents.vae is None:
        size = 2 * CHANNELS * model.resolution**2 * HALF_BYTES
        return DataNeed(images_per_second, size, "latents: mean and deviation in fp16")
    side = model.resolution * (REDUCTION if config.latents.vae else 1)
    size = JPEG_BYTES_PER_PIXEL * side**2
    return DataNeed(images_per_second, size, f"estimated: JPEGs of {side} x {side}")
