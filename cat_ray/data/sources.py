"""What people have: class folders, tars of tars, WebDataset shards, Parquet, and the digits.

A source is a list of units, each a place in a file with one or more samples that are read at once.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import pyarrow.parquet

from cat_ray.data.carried import CROP_COUNT, mnist, read_crop, read_digit
from cat_ray.data.decode import (
    IMAGE_ENDINGS,
    JSON_ENDING,
    LABEL_ENDING,
    BrokenSample,
    class_of,
    encoded_image,
)
from cat_ray.data.index import BLOCK_BYTES
from cat_ray.data.tar import Member, sample_extents, samples, scan, split_name
from cat_ray.errors import BadInput
from cat_ray.storage import Location

Kind = Literal["mnist", "photographs", "folders", "tars", "webdataset", "parquet"]
TAR, PARQUET = ".tar", ".parquet"
LOOKED_AT = 8


@dataclass(frozen=True)
class Unit:
    """Samples that lie together in a file.

    Attributes:
        file: its name below the source's folder; "" where the source is one file.
        begin: the first byte; of Parquet, the row group.
        end: the byte after the last; of Parquet, the row group after.
        count: samples.
        key: of a single image, its name.
        label: of a single image, its class id; -1 where the samples carry their own.
    """

    file: str
    begin: int
    end: int
    count: int
    key: str = ""
    label: int = -1


@dataclass(frozen=True)
class Encoded:
    """A sample as it comes from a source; `content` is an encoded image."""

    key: str
    label: int
    content: bytes


@dataclass(frozen=True)
class Source:
    """Where samples come from.

    Attributes:
        kind: how they lie there.
        place: the folder or file.
        image_column: of Parquet: bytes, or a struct with `bytes` and `path` as Hugging Face has it.
        label_column: of Parquet.
        crops: of the photographs, a key of `CROPS`.
    """

    kind: Kind
    place: Location
    image_column: str = "image"
    label_column: str = "label"
    crops: str = "256"


def guess_kind(place: Location) -> Kind:
    """How samples lie in a folder or file.

    Raises:
        BadInput: nothing there looks like a source.
    """
    if place.name.endswith(PARQUET):
        return "parquet"
    if place.name.endswith(TAR):
        return "tars" if _holds_tars(place) else "webdataset"
    names = place.sizes()
    if any(name.endswith(PARQUET) for name in names):
        return "parquet"
    tars = [name for name in sorted(names) if name.endswith(TAR)]
    if tars:
        return "webdataset" if _is_webdataset(place / tars[0]) else "tars"
    if place.folders():
        return "folders"
    if place.local_path is not None and not place.local_path.exists():
        raise BadInput(f"{place.uri} doesn't exist")
    raise BadInput(
        f"{place.uri} holds no class folders, tar files or Parquet files: give the folder, or the "
        "tar file, in which the images are"
    )


def list_units(source: Source) -> tuple[list[Unit], tuple[str, ...]]:
    """The units of a source, in a fixed order, and the names of its classes where it has any.

    Raises:
        BadInput: there are no samples.
    """
    listers: dict[Kind, Callable[[Source], tuple[list[Unit], tuple[str, ...]]]] = {
        "mnist": lambda source: (_numbered(len(mnist()[1])), tuple("0123456789")),
        "photographs": lambda source: (_numbered(CROP_COUNT), ()),
        "folders": _list_folders,
        "tars": _list_tars,
        "webdataset": _list_webdataset,
        "parquet": _list_parquet,
    }
    units, classes = listers[source.kind](source)
    if not units:
        raise BadInput(f"{source.place.uri} holds no samples of the kind {source.kind}")
    twice = [key for key, count in Counter(u.key for u in units if u.key).items() if count > 1]
    if twice:
        raise BadInput(
            f"{source.place.uri} holds {len(twice)} names twice but for endings and dots, such as "
            f"{twice[0]}: rename one of the two"
        )
    return units, classes


def read_unit(source: Source, unit: Unit) -> list[Encoded]:
    """A unit's samples. Of one without a class the label is -1, of one without an image the bytes
    are empty: who decodes it says so.

    Raises:
        BadInput: the file isn't as it was when the units were listed.
    """
    place = source.place / unit.file if unit.file else source.place
    if source.kind == "mnist":
        return [Encoded(unit.key, *read_digit(unit.begin))]
    if source.kind == "photographs":
        return [Encoded(unit.key, *read_crop(source.crops, unit.begin))]
    if source.kind == "parquet":
        return _read_row_group(source, place, unit)
    content = place.read_range(unit.begin, unit.end)
    if source.kind != "webdataset":
        return [Encoded(unit.key, unit.label, content)]
    found = []
    # Shards may each begin to count anew: neighbours of one name would become one sample.
    above = f"{_key(unit.file)}/" if unit.file else ""
    for sample in samples(content, unit.file, whole=False):
        try:
            image, label = encoded_image(sample.members), class_of(sample.members)
        except BrokenSample:
            image, label = b"", -1
        found.append(Encoded(f"{above}{sample.key}", label, image))
    return found


def _numbered(count: int) -> list[Unit]:
    return [Unit("", number, number + 1, 1, f"{number:08d}") for number in range(count)]


def _list_folders(source: Source) -> tuple[list[Unit], tuple[str, ...]]:
    files = {
        name: size
        for name, size in source.place.files_below().items()
        if "/" in name and name.lower().endswith(tuple(f".{e}" for e in IMAGE_ENDINGS))
    }
    classes = sorted({name.split("/")[0] for name in files})
    label = {name: place for place, name in enumerate(classes)}
    units = [
        Unit(name, 0, files[name], 1, _key(name), label[name.split("/")[0]])
        for name in sorted(files)
    ]
    return units, tuple(classes)


def _list_tars(source: Source) -> tuple[list[Unit], tuple[str, ...]]:
    """A tar of class tars, or a folder of them, as ImageNet is handed out."""
    if source.place.name.endswith(TAR):
        outer = [
            (member.name, "", member.start, member.start + member.size)
            for member in _scan(source.place)
            if member.name.endswith(TAR)
        ]
    else:
        sizes = source.place.sizes()
        outer = [(name, name, 0, size) for name, size in sizes.items() if name.endswith(TAR)]
    outer.sort()
    units = []
    for label, (name, file, begin, end) in enumerate(outer):
        stem = name.removesuffix(TAR)
        place = source.place / file if file else source.place
        for member in scan(place, begin, end):
            if member.name.lower().endswith(tuple(f".{e}" for e in IMAGE_ENDINGS)):
                key = _key(f"{stem}/{member.name}")
                units.append(Unit(file, member.start, member.start + member.size, 1, key, label))
    return units, tuple(name.removesuffix(TAR) for name, *_ in outer)


def _list_webdataset(source: Source) -> tuple[list[Unit], tuple[str, ...]]:
    place = source.place
    names = (
        [""] if place.name.endswith(TAR) else sorted(n for n in place.sizes() if n.endswith(TAR))
    )
    units = []
    for name in names:
        where = place / name if name else place
        for begin, end, count in blocks_of(sample_extents(where)):
            units.append(Unit(name, begin, end, count))
    return units, ()


def _list_parquet(source: Source) -> tuple[list[Unit], tuple[str, ...]]:
    place = source.place
    one = place.name.endswith(PARQUET)
    names = [""] if one else sorted(n for n in place.sizes() if n.endswith(PARQUET))
    units = []
    for name in names:
        where = place / name if name else place
        with where.opened() as file:
            table = pyarrow.parquet.ParquetFile(file)
            _check_columns(source, where, table)
            rows = table.metadata
            counts = [rows.row_group(group).num_rows for group in range(rows.num_row_groups)]
        units += [Unit(name, group, group + 1, count) for group, count in enumerate(counts)]
    return units, ()


def _read_row_group(source: Source, place: Location, unit: Unit) -> list[Encoded]:
    columns = [source.image_column, source.label_column]
    with place.opened() as file:
        table = pyarrow.parquet.ParquetFile(file)
        rows = table.read_row_group(unit.begin, columns=columns).to_pylist()
    stem = _key(unit.file or place.name)
    found = []
    for number, row in enumerate(rows):
        image, label = row[source.image_column], row[source.label_column]
        content = image.get("bytes") if isinstance(image, dict) else image
        key = f"{stem}-{unit.begin:05d}-{number:05d}"
        found.append(Encoded(key, -1 if label is None else int(label), content or b""))
    return found


def _check_columns(source: Source, place: Location, table: pyarrow.parquet.ParquetFile) -> None:
    names = table.schema_arrow.names
    if missing := {source.image_column, source.label_column} - set(names):
        raise BadInput(
            f"{place.uri} has no column {' or '.join(sorted(missing))}, it has "
            f"{', '.join(names)}: set source.image_column and .label_column"
        )


def blocks_of(extents: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbouring samples in blocks of about a mebibyte: begin, end, samples."""
    first = 0
    for place in range(1, len(extents)):
        if extents[place] - extents[first] >= BLOCK_BYTES or place == len(extents) - 1:
            yield extents[first], extents[place], place - first
            first = place


def _key(name: str) -> str:
    """A file's name as a sample's key: without its ending, and without dots."""
    return name.rsplit(".", 1)[0].replace(".", "_")


def _is_webdataset(shard: Location) -> bool:
    """Whether a tar has samples with a class, not one class's images."""
    endings = {split_name(member.name)[1] for member in islice(_scan(shard), LOOKED_AT)}
    return bool(endings & {LABEL_ENDING, JSON_ENDING})


def _holds_tars(place: Location) -> bool:
    return any(member.name.endswith(TAR) for member in islice(_scan(place), LOOKED_AT))


def _scan(place: Location) -> Iterator[Member]:
    return scan(place, 0, place.size() or 0)
