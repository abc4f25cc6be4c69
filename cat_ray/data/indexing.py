"""`cat-ray index`: looks at shards that others made, and writes the index that they lack."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from braceexpand import braceexpand

from cat_ray.connection import connected
from cat_ray.data.decode import BrokenSample, class_of, encoded_image, open_image, opened_image
from cat_ray.data.index import Index, Shard, write_index
from cat_ray.data.latents import CHANNELS
from cat_ray.data.packs import LATENTS, unpack
from cat_ray.data.sources import TAR
from cat_ray.data.tar import RawSample, read_samples
from cat_ray.data.tasks import run_tasks
from cat_ray.errors import BadInput
from cat_ray.operations.counting import Counting
from cat_ray.storage import Location

# Of Stable Diffusion's first VAEs, which is what latents come from that say nothing else.
SD_SCALING_FACTOR = 0.18215
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
        problems: a line for each thing that is wrong.
    """

    shard: Shard | None
    extents: tuple[int, ...]
    class_counts: dict[int, int]
    first_of_class: dict[int, str]
    shapes: tuple[tuple[int, int, int], ...]
    packs: tuple[int, ...]
    keys: tuple[str, ...]
    problems: tuple[str, ...]


def index_shards(
    folder: Location, pattern: str, num_classes: int | None, verify: bool
) -> tuple[Index | None, list[str]]:
    """Looks at shards, as a Ray Data job, and writes `index.json` beside them.

    Args:
        folder: where they lie.
        pattern: their names, with braces as in `train-{000000..000146}.tar`; all tar files if "".
        num_classes: class ids must be below this, if it is known.
        verify: decode every image and compare the names of all samples as well.

    Returns:
        The index, or None where a shard is no whole tar file, and a line for each problem.

    Raises:
        BadInput: there are no shards, they don't go together, or the storage fails.
    """
    found = folder.sizes()
    names = list(braceexpand(pattern)) if pattern else sorted(n for n in found if n.endswith(TAR))
    if not names:
        raise BadInput(f"{folder.uri} holds no files that end in {TAR}")
    if missing := [name for name in names if name not in found]:
        others = f", nor {len(missing) - 1} others" if missing[1:] else ""
        raise BadInput(f"{folder.uri} has no {missing[0]}{others}")
    rows = [{"name": name, "bytes": found[name]} for name in names]
    settings = {"folder": folder, "verify": verify}
    looks: dict[str, Look] = {}
    with connected(1, {}), Counting("shards", len(names)) as counting:
        for row in run_tasks(_task, rows, 1, **settings):
            looks[row["name"]] = _from_row(row)
            counting.add(row["name"])
    found_out = [looks[name] for name in names]
    problems = [line for look in found_out for line in look.problems]
    counts = Counter[int]()
    for look in found_out:
        counts.update(look.class_counts)
    first = {label: key for look in found_out[::-1] for label, key in look.first_of_class.items()}
    beyond = max(counts, default=0) + 1 if num_classes is None else num_classes
    problems += [
        f"class id {label} is not in 0 to {beyond - 1}: {first[label]}"
        + (f" and {count - 1} more" if count > 1 else "")
        for label, count in sorted(counts.items())
        if not 0 <= label < beyond
    ]
    found_in: dict[str, list[str]] = {}
    for name, look in zip(names, found_out, strict=True):
        for key in look.keys:
            found_in.setdefault(key, []).append(name)
    problems += [
        f"{len(shards)} samples are named {key}: in {', '.join(dict.fromkeys(shards))}"
        for key, shards in found_in.items()
        if len(shards) > 1
    ]
    if any(look.shard is None for look in found_out) or not counts or min(counts) < 0:
        return None, problems
    index = _index(folder, found_out, counts)
    extents = {look.shard.name: look.extents for look in found_out if look.shard is not None}
    return write_index(folder, index, extents), problems


def _task(row: dict[str, Any], folder: Location, verify: bool) -> dict[str, Any]:
    look = look_at(folder / row["name"], row["bytes"], verify)
    return {"name": row["name"], "look": json.dumps(asdict(look))}


def _from_row(row: dict[str, Any]) -> Look:
    look = json.loads(row["look"])
    return Look(
        **{
            **look,
            "shard": Shard(**look["shard"]) if look["shard"] else None,
            "class_counts": {int(label): n for label, n in look["class_counts"].items()},
            "first_of_class": {int(label): key for label, key in look["first_of_class"].items()},
            "shapes": tuple(map(tuple, look["shapes"])),
        }
    )


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
    problems: list[str] = []
    images = end = 0
    try:
        for sample in read_samples(place, size, digest.update):
            extents.append(sample.begin)
            end = sample.end
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
        return Look(None, (), {}, {}, (), (), (), (str(error),))
    shard = Shard(name, images, size, digest.hexdigest())
    return Look(
        shard,
        (*extents, end),
        dict(counts),
        first,
        tuple(sorted(shapes)),
        tuple(packs),
        tuple(keys),
        tuple(problems),
    )


def _shape(sample: RawSample, verify: bool) -> tuple[int, int, int]:
    """Width, height and channels of a sample's image."""
    content = encoded_image(sample.members)
    if verify:
        open_image(content, 3)
    with opened_image(content) as image:
        return *image.size, 1 if image.mode in GREY_MODES else 3


def _index(folder: Location, looks: Sequence[Look], counts: Counter[int]) -> Index:
    """The index of shards of one kind.

    Raises:
        BadInput: some hold images and some latents, or packs of several sizes.
    """
    shapes = {shape for look in looks for shape in look.shapes}
    holding_packs = [look for look in looks if look.packs]
    if holding_packs and len(holding_packs) < len(looks):
        raise BadInput(f"{folder.uri} holds images and latents: give each a folder of its own")
    # All but a shard's last pack are of one size.
    sizes = {size for look in holding_packs for size in look.packs[:-1]} or {
        size for look in holding_packs for size in look.packs
    }
    if len(sizes) > 1:
        raise BadInput(f"{folder.uri} holds packs of {sorted(sizes)} latents: prepare them anew")
    square = len({shape[:2] for shape in shapes}) == 1 and min(shapes)[0] == min(shapes)[1]
    return Index(
        contents="latents" if holding_packs else "images",
        resolution=min(shapes)[0] if square else None,
        channels=max(shape[2] for shape in shapes),
        class_counts=tuple(counts[label] for label in range(max(counts) + 1)),
        source=f"indexed at {folder.uri}",
        shards=tuple(look.shard for look in looks if look.shard is not None),
        extents_sha256="",
        pack_images=sizes.pop() if sizes else 1,
        made_with={"scaling_factor": SD_SCALING_FACTOR} if holding_packs else {},
    )
