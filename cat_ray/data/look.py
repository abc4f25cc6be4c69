"""What a shard that others made holds, and what is wrong with it."""

import hashlib
from collections import Counter
from dataclasses import dataclass

from cat_ray.data.decode import check_decodes, class_of, encoded_image
from cat_ray.data.image_file import BrokenSample, opened_image
from cat_ray.data.index import Shard
from cat_ray.data.latent_shape import CHANNELS
from cat_ray.data.packs import LATENTS, unpack
from cat_ray.data.tar import RawSample, read_samples, told_of_repeated
from cat_ray.errors import BadInput
from cat_ray.storage import Location

GREY_MODES = ("L", "1", "I;16", "I", "F", "LA")


@dataclass(frozen=True)
class Look:
    """What one shard holds.

    Attributes:
        shard: its entry in the index, None if it is no whole tar file.
        extents: where each sample, or pack, begins, and where the last ends, in bytes.
        class_counts: samples of each class that occurs.
        shapes: width, height and channels that occur; of latents their side and channels.
        first_of_class: the name of the first sample of each class that occurs.
        packs: samples in each pack but the last, where it holds latents.
        keys: names of samples, if they were asked for.
        left_out: how many members belong to no sample.
        first_left_out: the name of one of them.
        problems: a line for each thing that is wrong.
    """

    shard: Shard | None
    extents: tuple[int, ...]
    class_counts: dict[int, int]
    first_of_class: dict[int, str]
    shapes: tuple[tuple[int, int, int], ...]
    packs: tuple[int, ...]
    keys: tuple[str, ...]
    left_out: int
    first_left_out: str
    problems: tuple[str, ...]


def look_at(place: Location, size: int, verify: bool) -> Look:
    """What a shard holds; with `verify` every image is decoded, and samples' names are kept.

    Raises:
        StorageDown: the storage doesn't answer.
    """
    name, digest = place.name, hashlib.sha256()
    counts, shapes = Counter[int](), set[tuple[int, int, int]]()
    first: dict[int, str] = {}
    extents: list[int] = []
    packs: list[int] = []
    keys: list[str] = []
    left_out: list[str] = []
    problems: list[str] = []
    images = end = 0
    try:
        for sample in read_samples(place, size, digest.update, left_out.append, alone=True):
            extents.append(sample.begin)
            end = sample.end
            if sample.repeated:
                raise BadInput(f"shard {name}: {told_of_repeated(sample)}")
            if LATENTS in sample.members:
                pack = unpack(sample, name)
                shapes.add((pack.latents.shape[-1], pack.latents.shape[-2], CHANNELS))
                packs.append(len(pack.classes))
                counts.update(pack.classes.tolist())
                for label, key in zip(pack.classes.tolist(), pack.keys, strict=True):
                    first.setdefault(label, f"{name}: {key}")
                images += len(pack.classes)
                keys += pack.keys if verify else []
                continue
            images += 1
            keys += [sample.key] if verify else []
            try:
                shapes.add(_shape(sample, verify))
                label = class_of(sample.members)
                counts[label] += 1
                first.setdefault(label, f"{name}: {sample.key}")
            except BrokenSample as error:
                problems.append(f"{name}: {sample.key}: {error}")
    except BadInput as error:
        return Look(None, (), {}, {}, (), (), (), 0, "", (str(error),))
    return Look(
        shard=Shard(name, images, size, digest.hexdigest()),
        extents=(*extents, end),
        class_counts=dict(counts),
        first_of_class=first,
        shapes=tuple(sorted(shapes)),
        packs=tuple(packs),
        keys=tuple(keys),
        left_out=len(left_out),
        first_left_out=left_out[0] if left_out else "",
        problems=tuple(problems),
    )


def _shape(sample: RawSample, verify: bool) -> tuple[int, int, int]:
    """Width, height and channels of a sample's image."""
    content = encoded_image(sample.members)
    if verify:
        check_decodes(content)
    with opened_image(content) as image:
        return *image.size, 1 if image.mode in GREY_MODES else 3
