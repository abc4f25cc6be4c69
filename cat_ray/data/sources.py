"""What people have: class folders, tars of tars, WebDataset shards, Parquet, and the digits.

A source is a list of units, each a place in a file with one or more samples that are read at once.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from cat_ray.data.carried import CROP_COUNT, mnist, read_crop, read_digit
from cat_ray.data.class_folders import check_are_no_splits, list_class_folders
from cat_ray.data.decode import (
    IMAGE_ENDINGS,
    JSON_ENDING,
    LABEL_ENDING,
    BrokenSample,
    class_of,
    encoded_image,
)
from cat_ray.data.index import BLOCK_BYTES
from cat_ray.data.labels import LARGEST_CLASS
from cat_ray.data.names import counted, ending_of, is_image, matches, named
from cat_ray.data.parquet_source import PARQUET, list_row_groups, read_rows
from cat_ray.data.tar import Member, members
from cat_ray.data.tar_listing import Group, grouped, listed
from cat_ray.data.tree import check_is_one_split, files_of, look_below
from cat_ray.data.units import LOOKED_AT, Encoded, Kind, Source, Unit, key_of, place_of, some_of
from cat_ray.errors import BadInput, Damaged
from cat_ray.storage import Location

TAR = ".tar"
LOOKED_TARS = 4
PADDED = 4
Listing = tuple[list[Unit], tuple[str, ...]]


def guess_kind(place: Location, pattern: str = "") -> Kind:
    """How samples lie in a folder or file.

    Raises:
        BadInput: nothing there looks like a source, or it might be of two kinds.
    """
    if place.name.endswith((PARQUET, TAR)) and place.exists():
        if place.name.endswith(PARQUET):
            return "parquet"
        return "tars" if _holds_tars(place) else "webdataset"
    tree = look_below(place, Counter(), deep=bool(pattern))
    names = [name for name in tree.files if matches(name, pattern)]
    if not any(name.endswith((PARQUET, TAR)) for name in names):
        some = tree.folders[:LOOKED_AT]
        inside = {name: look_below(place / name, Counter(), deep=False).files for name in some}
        below = [f"{folder}/{name}" for folder, files in inside.items() for name in files]
        if not any(map(is_image, below)):
            names += below
    if any(name.endswith(PARQUET) for name in names):
        return "parquet"
    if tars := sorted(name for name in names if name.endswith(TAR)):
        return _kind_of_tars(place, tars)
    if tree.folders or any(map(is_image, names)):
        return "folders"
    raise BadInput(
        f"{place.uri} holds no class folders, tar files or Parquet files: give the folder, or the "
        "tar file, in which the images are"
    )


def list_units(source: Source, left_out: Counter[str] | None = None) -> Listing:
    """The units of a source, in a fixed order, and the names of its classes where it has any.

    Args:
        source: what to look at.
        left_out: gets a count of what can't be used, by file ending or reason.

    Raises:
        BadInput: there are no samples, or it is unclear of which class they are.
    """
    listers: dict[Kind, Callable[[Source, Counter[str]], Listing]] = {
        "mnist": lambda *_: (_numbered(len(mnist()[1])), tuple("0123456789")),
        "photographs": lambda *_: (_numbered(CROP_COUNT), ()),
        "folders": list_class_folders,
        "tars": _list_tars,
        "webdataset": lambda source, left_out: (_list_webdataset(source, left_out), ()),
        "parquet": lambda source, left_out: (list_row_groups(source, left_out), ()),
    }
    counts = Counter[str]() if left_out is None else left_out
    units, classes = listers[source.kind](source, counts)
    if not any(unit.count for unit in units):
        others = f"; left out: {counted(counts)}" if counts else ""
        raise BadInput(f"{source.place.uri} holds no samples of the kind {source.kind}{others}")
    twice = [key for key, count in Counter(u.key for u in units if u.key).items() if count > 1]
    if twice:
        raise BadInput(
            f"{source.place.uri} holds {len(twice):,} name{'s' * (len(twice) > 1)} twice, but for "
            f"endings and dots, such as {twice[0]}: rename one of the two"
        )
    return units, classes


def read_unit(source: Source, unit: Unit) -> list[Encoded]:
    """A unit's samples. Of one without a class the label is -1, of one without an image the bytes
    are empty: who decodes it says so.

    Raises:
        BadInput: the file isn't as it was when the units were listed.
    """
    if source.kind == "mnist":
        return [Encoded(unit.key, *read_digit(unit.begin))]
    if source.kind == "photographs":
        return [Encoded(unit.key, *read_crop(source.crops, unit.begin))]
    if source.kind == "parquet":
        return read_rows(source, unit, 0, unit.count)
    if source.kind == "webdataset":
        return _read_block(source, unit)
    content = place_of(source, unit.file).read_range(unit.begin, unit.end)
    return [Encoded(unit.key, unit.label, content)]


def _numbered(count: int) -> list[Unit]:
    return [Unit("", number, number + 1, 1, f"{number:08d}") for number in range(count)]


def _list_tars(source: Source, left_out: Counter[str]) -> Listing:
    """A tar of class tars, or a folder of them, as ImageNet is handed out."""
    files = files_of(source, TAR, left_out)
    if "" in files:
        inner = list(listed(source.place, 0, files[""], left_out))
        outer = [(m.name, "", m.start, m.start + m.size) for m in inner if m.name.endswith(TAR)]
        left_out.update(ending_of(m.name) for m in inner if not m.name.endswith(TAR))
    else:
        outer = [(name, name, 0, size) for name, size in files.items()]
    outer.sort()
    classes = tuple(name.removesuffix(TAR) for name, *_ in outer)
    check_are_no_splits(source, classes, TAR)
    units = []
    for label, (stem, (_, file, begin, end)) in enumerate(zip(classes, outer, strict=True)):
        folders = set[str]()
        for member in listed(place_of(source, file), begin, end, left_out):
            if is_image(member.name):
                folders.add(member.name.removeprefix("./").rpartition("/")[0])
                key = key_of(f"{stem}/{member.name}")
                units.append(Unit(file, member.start, member.start + member.size, 1, key, label))
            else:
                left_out[ending_of(member.name)] += 1
        _check_is_one_class(stem, folders)
    used = {unit.label for unit in units}
    if empty := [name for label, name in enumerate(classes) if label not in used]:
        left_out[f"classes without an image ({named(empty)})"] += len(empty)
    return units, classes


def _check_is_one_class(tar: str, folders: set[str]) -> None:
    """Refuses a class tar whose images lie in several folders: those may be the classes."""
    if len(folders) > 1:
        raise BadInput(
            f"{tar}{TAR} holds images in several folders, {named(sorted(folders))}: a tar of this "
            "kind is a class. If the folders are classes, unpack it and give source.uri the folder"
        )


def _list_webdataset(source: Source, left_out: Counter[str]) -> list[Unit]:
    files = files_of(source, TAR, left_out)
    check_is_one_split(source, files)
    units = []
    for name, size in files.items():
        place, extents, end = place_of(source, name), [], 0
        keys = set[str]()
        for group in grouped(listed(place, 0, size, left_out), place.name, left_out):
            _check_group(group, place.name, keys, left_out)
            keys.add(group.key)
            extents.append(group.begin)
            end = group.end
        for begin, stop, count in blocks_of([*extents, end]):
            units.append(Unit(name, begin, stop, count))
    _check_classes(source, some_of(units))
    return units


def _check_group(group: Group, shard: str, keys: set[str], left_out: Counter[str]) -> None:
    """Refuses a sample that WebDataset's rule for names doesn't make out, and counts bad ones."""
    if group.key in keys:
        raise BadInput(
            f"shard {shard} holds the sample {group.key} twice, or its members apart: give every "
            "sample a name of its own, and put its members side by side"
        )
    if not any(ending in group.members for ending in IMAGE_ENDINGS):
        for ending, member in group.members.items():
            if is_image(ending):
                raise BadInput(
                    f"shard {shard}: {member.name} has dots in its name, and WebDataset takes all "
                    f"behind the first, {ending}, as its ending: replace the others"
                )
        left_out["samples without an image"] += 1
    elif not {LABEL_ENDING, JSON_ENDING} & group.members.keys():
        left_out["samples without a class"] += 1


def _check_classes(source: Source, some: Sequence[Unit]) -> None:
    """Looks whether labels are there as they should be, before all is read.

    Raises:
        BadInput: of some samples none has a class.
    """
    found = [sample for unit in some for sample in _read_block(source, unit)]
    if found and all(sample.label < 0 for sample in found):
        why = found[0].problem or f"its class is {found[0].label}"
        raise BadInput(
            f"{source.place.uri}: none of {len(found):,} samples from all over it has a class: "
            f"{found[0].key}: {why}. Add the classes; if each tar file is a class, set "
            "source.kind: tars"
        )


def _read_block(source: Source, unit: Unit) -> list[Encoded]:
    """The samples of a run of whole members of a WebDataset shard."""
    place = place_of(source, unit.file)
    content = place.read_range(unit.begin, unit.end)
    # Shards may each begin to count anew: neighbours of one name would become one sample.
    above = f"{key_of(unit.file)}/" if unit.file else ""
    found = []
    for group in grouped(members(content, unit.file, whole=False), unit.file, Counter()):
        held = {e: content[m.start : m.start + m.size] for e, m in group.members.items()}
        image, label, problem = b"", -1, ""
        try:
            image, label = encoded_image(held), class_of(held)
            if label > LARGEST_CLASS:
                raise BrokenSample(f"its class {label} is above {LARGEST_CLASS}")
        except BrokenSample as error:
            image, label, problem = b"", -1, str(error)
        found.append(Encoded(f"{above}{group.key}", label, image, problem))
    if len(found) != unit.count:
        raise Damaged(f"{place.uri} has other samples than when it was listed: begin anew")
    return found


def blocks_of(extents: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbouring samples in blocks of about a mebibyte: begin, end, samples."""
    first = 0
    for place in range(1, len(extents)):
        if extents[place] - extents[first] >= BLOCK_BYTES or place == len(extents) - 1:
            yield extents[first], extents[place], place - first
            first = place


def _kind_of_tars(place: Location, names: Sequence[str]) -> Kind:
    """Whether tars in a folder are WebDataset shards, or the images of a class each.

    Raises:
        BadInput: some are that, some are this, or it can't be told.
    """
    some = names[:: max(1, len(names) // LOOKED_TARS)][:LOOKED_TARS]
    kinds = {name: kind for name in some if (kind := _kind_of_tar(place / name)) is not None}
    if len(set(kinds.values())) > 1:
        looks = ", ".join(f"{name} like {kind}" for name, kind in kinds.items())
        raise BadInput(
            f"{place.uri}: it can't be told what the tar files are ({looks}): put them into "
            "folders of their own, or set source.kind"
        )
    if "webdataset" in kinds.values():
        return "webdataset"
    if _are_counted(names):
        raise BadInput(
            f"{place.uri}: {names[0]} to {names[-1]} hold images without classes: if each tar file "
            "is a class, set source.kind: tars, else add a .cls member to each image"
        )
    return "tars"


def _kind_of_tar(shard: Location) -> Kind | None:
    """What a tar's first members look like: samples of several members, or images only."""
    endings: dict[str, set[str]] = {}
    for member in islice(_listed(shard), LOOKED_AT):
        endings.setdefault(member.name.rpartition(".")[0], set()).add(ending_of(member.name))
    together = set[str]().union(*endings.values())
    if not together:
        return None
    labelled = together & {f".{LABEL_ENDING}", f".{JSON_ENDING}"}
    accompanied = any(len(found) > 1 and any(map(is_image, found)) for found in endings.values())
    return "webdataset" if labelled or accompanied else "tars"


def _are_counted(names: Sequence[str]) -> bool:
    """Whether names differ by a running number behind a dash or zeros, as those of shards do."""
    found = [re.fullmatch(r"(.*?)([0-9]+)", name.removesuffix(TAR)) for name in names]
    parts = {match[1]: match[2] for match in found if match}
    numbers = sorted(int(match[2]) for match in found if match)
    if len(names) == 1 or len(parts) > 1 or numbers[:1] not in ([0], [1]):
        return False
    ((word, digits),) = parts.items()
    padded = digits.startswith("0") and len(digits) >= PADDED
    ordered = numbers == list(range(numbers[0], numbers[0] + len(names)))
    return ordered and (word.endswith(("-", "_", ".")) or padded)


def _holds_tars(place: Location) -> bool:
    return any(member.name.endswith(TAR) for member in islice(_listed(place), LOOKED_AT))


def _listed(place: Location) -> Iterator[Member]:
    return listed(place, 0, place.size() or 0, Counter())
