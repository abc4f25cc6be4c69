"""Writes one shard: a tar file whose bytes depend on nothing but the samples."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import webdataset

from cat_ray.data.index import Shard
from cat_ray.storage import Location


@dataclass(frozen=True)
class Entry:
    """A WebDataset sample to be written: one image, or one pack of many latents.

    Attributes:
        key: its name.
        members: contents by ending.
        labels: the class ids of the images in it.
    """

    key: str
    members: Mapping[str, bytes]
    labels: Sequence[int]


@dataclass(frozen=True)
class Written:
    """What became of it.

    Attributes:
        shard: its entry in the index.
        extents: where each entry begins, and where the last ends, in bytes.
        class_counts: images of each class that occurs.
    """

    shard: Shard
    extents: tuple[int, ...]
    class_counts: Mapping[int, int]


def write_shard_file(folder: Location, name: str, entries: Iterable[Entry]) -> Written:
    """Writes a shard on this machine's disk, then puts it in place at once."""
    extents, counts = [], Counter[int]()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        # No clock and no names of people in the archive: the same samples give the same bytes.
        with webdataset.TarWriter(str(path), mtime=0, user="", group="") as writer:
            for entry in entries:
                extents.append(writer.tarstream.offset)
                writer.write({"__key__": entry.key, **entry.members})
                counts.update(entry.labels)
            extents.append(writer.tarstream.offset)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        (folder / name).upload(path)
    return Written(Shard(name, counts.total(), size, digest), tuple(extents), dict(counts))
