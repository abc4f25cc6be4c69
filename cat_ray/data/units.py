"""What a source of images is, and the units in which its samples are listed and read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cat_ray.storage import Location

Kind = Literal["mnist", "photographs", "folders", "tars", "webdataset", "parquet"]
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
    """A sample as it comes from a source.

    Attributes:
        key: its name.
        label: its class id; -1 if it has none.
        content: the encoded image; empty if there is none.
        problem: why the sample can't be used, where that is known.
    """

    key: str
    label: int
    content: bytes
    problem: str = ""


@dataclass(frozen=True)
class Source:
    """Where samples come from.

    Attributes:
        kind: how they lie there.
        place: the folder or file.
        image_column: of Parquet: bytes, or a struct with `bytes` and `path` as Hugging Face has it.
        label_column: of Parquet.
        crops: of the photographs, a key of `CROPS`.
        pattern: of the files that are read, as in `train-*.parquet`; all if "".
    """

    kind: Kind
    place: Location
    image_column: str = "image"
    label_column: str = "label"
    crops: str = "256"
    pattern: str = ""


def place_of(source: Source, file: str) -> Location:
    """A file of a source; "" is the source itself."""
    return source.place / file if file else source.place


def key_of(name: str) -> str:
    """A file's name as a sample's key: without its ending, and without dots."""
    return name.rsplit(".", 1)[0].replace(".", "_")


def some_of(units: Sequence[Unit]) -> Sequence[Unit]:
    """A few units from all over a source, for a look before all is read."""
    filled = [unit for unit in units if unit.count]
    return filled[:: -(-len(filled) // LOOKED_AT) or 1]
