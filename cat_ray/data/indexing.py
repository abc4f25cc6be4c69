"""`cat-ray index`: looks at shards that others made, and writes the index that they lack."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cat_ray.connection import connected
from cat_ray.data.index import INDEX_NAME, Index, Shard, check_is_ours, dense, write_index
from cat_ray.data.labels import MAX_CLASSES
from cat_ray.data.look import Look, look_at
from cat_ray.data.sources import TAR
from cat_ray.data.tasks import run_tasks
from cat_ray.data.writable import check_writable
from cat_ray.errors import BadInput
from cat_ray.operations.counting import Counting
from cat_ray.storage import Location

# Of Stable Diffusion's first VAEs, which is what latents come from that say nothing else.
SD_SCALING_FACTOR = 0.18215
ADVICE = (
    f"{INDEX_NAME} must lie beside the shards, so copy them, or have somebody index them who may "
    "write there"
)


@dataclass(frozen=True)
class Indexed:
    """What came of it.

    Attributes:
        index: None where a shard is no whole tar file, or a class id can't be one.
        problems: a line for each.
        left_out: a line on members that belong to no sample; "" where there are none.
    """

    index: Index | None
    problems: list[str]
    left_out: str


def index_shards(
    folder: Location, names: Sequence[str], num_classes: int | None, verify: bool
) -> Indexed:
    """Looks at shards, as a Ray Data job, and writes `index.json` beside them.

    Args:
        folder: where they lie.
        names: the shards, in the order of the data set; all tar files there if there are none.
        num_classes: class ids must be below this, if it is known.
        verify: decode every image and compare the names of all samples as well.

    Raises:
        BadInput: there are no shards, they don't go together, or no index can be written there.
        StorageDown: the storage doesn't answer.
    """
    found = _sizes(folder)
    names = names or sorted(name for name in found if name.endswith(TAR) and name[0] != ".")
    if not names:
        raise BadInput(f"{folder.uri} holds no files that end in {TAR}")
    if missing := [name for name in names if name not in found]:
        others = f", nor {len(missing) - 1} others" if missing[1:] else ""
        raise BadInput(f"{folder.uri} has no {missing[0]}{others}")
    check_writable(folder, ADVICE)
    check_is_ours(folder)
    rows = [{"name": name, "bytes": found[name]} for name in names]
    settings = {"folder": folder, "verify": verify}
    looks: dict[str, Look] = {}
    with connected(1, {}), Counting("shards", len(names)) as counting:
        for row in run_tasks(_task, rows, 1, **settings):
            looks[row["name"]] = _from_row(row)
            counting.add(row["name"])
    found_out = [looks[name] for name in names]
    counts = Counter[int]()
    for look in found_out:
        counts.update(look.class_counts)
    problems = [line for look in found_out for line in look.problems]
    problems += _wrong_classes(found_out, counts, num_classes)
    problems += _names_twice(names, found_out) if verify else []
    if not counts and not problems:
        problems.append(f"there is no sample in {', '.join(names[:3])}")
    left_out = _told_left_out(names, found_out)
    possible = counts and min(counts) >= 0 and max(counts) < MAX_CLASSES
    if any(look.shard is None for look in found_out) or not possible:
        return Indexed(None, problems, left_out)
    index = _index(folder, found_out, counts)
    extents = {look.shard.name: look.extents for look in found_out if look.shard is not None}
    return Indexed(write_index(folder, index, extents), problems, left_out)


def _sizes(folder: Location) -> dict[str, int]:
    """Name and bytes of each file in the folder.

    Raises:
        BadInput: a name is no text.
    """
    try:
        return folder.sizes()
    except UnicodeDecodeError as error:
        told = f"{folder.uri} holds a file whose name is not UTF-8, {error.object!r}"
        raise BadInput(f"{told}: rename it") from error


def _wrong_classes(
    looks: Sequence[Look], counts: Counter[int], num_classes: int | None
) -> Iterable[str]:
    """A line for each class id that can't be one, or is beyond the number of classes."""
    first = {label: key for look in looks[::-1] for label, key in look.first_of_class.items()}
    largest = max(counts, default=0) + 1 if num_classes is None else num_classes
    beyond = min(largest, MAX_CLASSES)
    for label, count in sorted(counts.items()):
        if not 0 <= label < beyond:
            more = f" and {count - 1} more" if count > 1 else ""
            yield f"class id {label} is not in 0 to {beyond - 1}: {first[label]}{more}"


def _names_twice(names: Sequence[str], looks: Sequence[Look]) -> Iterable[str]:
    """A line for each name that several samples have."""
    found_in: dict[str, list[str]] = {}
    for name, look in zip(names, looks, strict=True):
        for key in look.keys:
            found_in.setdefault(key, []).append(name)
    for key, shards in found_in.items():
        if len(shards) > 1:
            among = ", ".join(dict.fromkeys(shards))
            yield f"{len(shards)} samples are named {key}: in {among}"


def _told_left_out(names: Sequence[str], looks: Sequence[Look]) -> str:
    """A line on the members that belong to no sample; "" where there are none."""
    first = [f"{n}: {x.first_left_out}" for n, x in zip(names, looks, strict=True) if x.left_out]
    count = sum(look.left_out for look in looks)
    return f"{count:,} members belong to no sample, such as {first[0]}: left out" if count else ""


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
        class_counts=dense(counts),
        source=f"indexed at {folder.uri}",
        shards=tuple(look.shard for look in looks if look.shard is not None),
        extents_sha256="",
        pack_images=sizes.pop() if sizes else 1,
        made_with={"scaling_factor": SD_SCALING_FACTOR} if holding_packs else {},
    )
