"""Images and class ids in Parquet files, as Hugging Face has them, a row group at a time."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow.parquet
from pyarrow import types

from cat_ray.data.labels import class_id
from cat_ray.data.names import one_line
from cat_ray.data.tree import check_is_one_split, files_of
from cat_ray.data.units import LOOKED_AT, Encoded, Source, Unit, key_of, place_of, some_of
from cat_ray.errors import BadInput, Damaged, last_line
from cat_ray.storage import Location

PARQUET = ".parquet"
# Column chunks are read in pieces: a row group may have gigabytes.
PIECE_BYTES = 2**20
IMAGES_TOGETHER, LABELS_TOGETHER = 16, 2**16
NO_CLASS = "rows without a class"
# Encoded images hardly shrink: a file that does was made to fill the memory.
LARGE_BYTES, MOST_SHRUNK = 2**28, 20
NAMES_SHOWN = 20


def list_row_groups(source: Source, left_out: Counter[str]) -> list[Unit]:
    """A unit for each row group; all labels are looked at, and a few images.

    Raises:
        BadInput: a file is none of Parquet, or its columns hold no images or no class ids.
    """
    files = files_of(source, PARQUET, left_out)
    check_is_one_split(source, files)
    units = []
    for name in files:
        place = place_of(source, name)
        with _opened(place) as table:
            rows = table.metadata
            counts = [rows.row_group(group).num_rows for group in range(rows.num_row_groups)]
            if sum(counts):
                _check_columns(source, place, table)
                _check_size(place, rows)
                _check_labels(source, place, table, left_out)
        units += [Unit(name, group, group + 1, count) for group, count in enumerate(counts)]
    _check_images(source, some_of(units))
    return units


def read_rows(source: Source, unit: Unit, first: int, stop: int) -> list[Encoded]:
    """Some samples of a row group: from one row of it to another.

    Raises:
        BadInput: the file can't be read, or isn't as it was when it was listed.
    """
    place = place_of(source, unit.file)
    stem = key_of(unit.file or place.name)
    columns = [source.image_column, source.label_column]
    found: list[Encoded] = []
    number = 0
    with _opened(place) as table:
        for batch in table.iter_batches(IMAGES_TOGETHER, [unit.begin], columns):
            begin, number = number, number + batch.num_rows
            start = max(0, first - begin)
            wanted = batch.slice(start, max(0, stop - begin - start)).to_pylist()
            for place_in, row in enumerate(wanted, begin + start):
                key = f"{stem}-{unit.begin:05d}-{place_in:05d}"
                found.append(_encoded(key, row[columns[0]], row[columns[1]]))
            if number >= stop:
                break
    if len(found) != stop - first:
        raise Damaged(f"{place.uri} has other rows than when it was listed: begin anew")
    return found


def _encoded(key: str, image: Any, label: Any) -> Encoded:
    content = image.get("bytes") if isinstance(image, dict) else image
    number = class_id(int(label) if isinstance(label, bool) else label)
    label = -1 if number is None else number
    try:
        return Encoded(key, label, bytes(content or b""))
    except TypeError:
        return Encoded(key, label, b"", "its image is a list with gaps")


@contextmanager
def _opened(place: Location) -> Iterator[pyarrow.parquet.ParquetFile]:
    try:
        with place.opened() as file:
            yield pyarrow.parquet.ParquetFile(file, buffer_size=PIECE_BYTES)
    # What storage raises are our own errors: the others are Arrow's about the content.
    except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
        raise Damaged(
            f"{place.uri} can't be read as Parquet ({last_line(error)}): get the file again"
        ) from error


def _check_columns(source: Source, place: Location, table: pyarrow.parquet.ParquetFile) -> None:
    schema = table.schema_arrow
    names = schema.names
    wanted = (source.image_column, source.label_column)
    if missing := set(wanted) - set(names):
        raise BadInput(
            f"{place.uri} has no column {' or '.join(sorted(missing))}, it has "
            f"{', '.join(map(one_line, names[:NAMES_SHOWN]))}"
            f"{' ...' * (len(names) > NAMES_SHOWN)}: set source.image_column and .label_column"
        )
    for name in wanted:
        if names.count(name) > 1:
            raise BadInput(f"{place.uri} has {names.count(name)} columns {name}: rename the others")
    kind = schema.field(source.image_column).type
    if not _holds_images(kind):
        shown = one_line(str(kind))
        url = " Images behind URLs must be downloaded first." if _is_text(kind) else ""
        raise BadInput(
            f"{place.uri}: column {source.image_column} is of type {shown}, not encoded images "
            f"(bytes, or a struct with bytes as Hugging Face has it): set source.image_column.{url}"
        )
    kind = schema.field(source.label_column).type
    if not _holds_labels(kind):
        shown = one_line(str(kind))
        raise BadInput(
            f"{place.uri}: column {source.label_column} is of type {shown}, not class ids: set "
            "source.label_column to one of whole numbers"
        )


def _check_size(place: Location, rows: pyarrow.parquet.FileMetaData) -> None:
    """Refuses a few kilobytes that become gigabytes, before they do.

    By row groups: at what a damaged file says of a column Arrow may end the process.
    """
    held = sum(rows.row_group(group).total_byte_size for group in range(rows.num_row_groups))
    size = place.size() or 0
    if held > max(LARGE_BYTES, MOST_SHRUNK * size):
        raise BadInput(
            f"{place.uri} has {size:,} bytes that become {held:,}, which encoded images don't: "
            "write the file anew with JPEG, PNG or WEBP in it"
        )


def _check_labels(
    source: Source, place: Location, table: pyarrow.parquet.ParquetFile, left_out: Counter[str]
) -> None:
    """Counts rows without a class, and refuses what is no class id."""
    column, kind = source.label_column, table.schema_arrow.field(source.label_column).type
    found = Counter[Any]()
    for batch in table.iter_batches(LABELS_TOGETHER, columns=[column]):
        found.update(batch.column(column).to_pylist())
    for label, count in found.items():
        try:
            number = class_id(int(label) if isinstance(label, bool) else label)
        except ValueError as error:
            raise BadInput(
                f"{place.uri}: column {column} of type {kind} holds no class id: {error}. Set "
                "source.label_column to one of whole numbers"
            ) from error
        if number is None or number < 0:
            left_out[NO_CLASS] += count


def _check_images(source: Source, some: Sequence[Unit]) -> None:
    """Looks whether images are there, before all is read: a file may hold only their paths.

    Statistics would count them, but with a damaged file Arrow ends the process there.

    Raises:
        BadInput: some rows have none.
    """
    found = [s for unit in some for s in read_rows(source, unit, 0, min(unit.count, LOOKED_AT))]
    if found and not any(sample.content for sample in found):
        raise BadInput(
            f"{source.place.uri}: none of {len(found):,} rows from all over it has an image in "
            f"column {source.image_column}: write the files anew with the images' bytes in them"
        )


def _value_type(kind: pyarrow.DataType) -> pyarrow.DataType:
    return kind.value_type if types.is_dictionary(kind) else kind


def _holds_images(kind: pyarrow.DataType) -> bool:
    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        kind = kind.field(place).type if place >= 0 else kind
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return types.is_uint8(kind.value_type)
    kind = _value_type(kind)
    return (
        types.is_null(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _is_text(kind: pyarrow.DataType) -> bool:
    kind = _value_type(kind)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _holds_labels(kind: pyarrow.DataType) -> bool:
    if _is_text(kind):
        return True
    kind = _value_type(kind)
    return (
        types.is_null(kind)
        or types.is_integer(kind)
        or types.is_boolean(kind)
        or types.is_floating(kind)
        or types.is_decimal(kind)
    )
