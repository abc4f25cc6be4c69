"""Whole shards and whole data sets, read without Ray."""

import numpy as np

from cat_ray.data.decode import BrokenSample, RawSample, decode_sample, untar
from cat_ray.data.index import Index, Shard
from cat_ray.errors import BadInput
from cat_ray.storage import Location


def read_shard(folder: Location, shard: Shard) -> list[RawSample]:
    """All samples of a shard, encoded.

    Raises:
        BadInput: the shard can't be read, or holds another number of samples than indexed.
    """
    samples = list(untar((folder / shard.name).read(), shard.name))
    if len(samples) != shard.count:
        raise BadInput(f"shard {shard.name} holds {len(samples)} samples, not {shard.count}")
    return samples


def read_images(
    folder: Location, index: Index, num_classes: int, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first readable images `[N, c, R, R]` uint8, at most `limit`, and their classes `[N]`."""
    images, labels = [], []
    samples = (sample for shard in index.shards for sample in read_shard(folder, shard))
    for sample in samples:
        try:
            image, label = decode_sample(sample, index.channels, index.resolution, num_classes)
        except BrokenSample:
            continue
        images.append(image)
        labels.append(label)
        if len(images) == limit:
            break
    return np.stack(images), np.asarray(labels, dtype=np.int64)
