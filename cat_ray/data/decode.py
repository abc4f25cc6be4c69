"""One shard's bytes to samples: untar, group by key, decode."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from cat_ray.errors import BadInput

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp")
LABEL_ENDING = "cls"
UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
)
BLOCK_BYTES = tarfile.BLOCKSIZE
MODES = {1: "L", 3: "RGB"}


class BrokenSample(Exception):
    """A sample that can't be decoded; the message says which and why."""


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in the shard: member contents by ending."""

    key: str
    members: dict[str, bytes]


def untar(content: bytes, name: str) -> Iterator[RawSample]:
    """The samples of a WebDataset shard: neighbouring members that share the name up to a dot.

    Raises:
        BadInput: it is not a tar file, or ends in the middle of one.
    """
    key, members = "", {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for info in archive:
                if not info.isfile():
                    continue
                folder, _, base = info.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if f"{folder}/{stem}" != key:
                    if members:
                        yield RawSample(key.lstrip("/"), members)
                    key, members = f"{folder}/{stem}", {}
                file = archive.extractfile(info)
                members[ending.lower()] = file.read() if file else b""
            # The tarfile module takes a damaged header, or a missing one, for the end.
            if content[archive.offset :][:BLOCK_BYTES] != bytes(BLOCK_BYTES):
                raise tarfile.ReadError("it breaks off, or a header in it is damaged")
    except tarfile.TarError as error:
        raise BadInput(f"shard {name} is not a whole tar file: {error}") from error
    if members:
        yield RawSample(key.lstrip("/"), members)


def decode_image(content: bytes, channels: int, resolution: int) -> np.ndarray:
    """Encoded image to `[channels, resolution, resolution]` uint8.

    Raises:
        BrokenSample: it isn't a readable image, or has another size.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert(MODES[channels]), dtype=np.uint8)
    except UNREADABLE as error:
        raise BrokenSample(f"not a readable image ({error})") from error
    if pixels.shape[:2] != (resolution, resolution):
        height, width = pixels.shape[:2]
        raise BrokenSample(f"{width} x {height}, not {resolution} x {resolution}")
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def decode_sample(
    sample: RawSample, channels: int, resolution: int, num_classes: int
) -> tuple[np.ndarray, int]:
    """The image `[channels, resolution, resolution]` uint8 and the class id of a sample.

    Raises:
        BrokenSample: a part is missing or unreadable.
        BadInput: the class id is outside `num_classes`.
    """
    encoded = next((sample.members[e] for e in IMAGE_ENDINGS if e in sample.members), None)
    if encoded is None or LABEL_ENDING not in sample.members:
        raise BrokenSample(f"it needs an image and a .{LABEL_ENDING} member")
    try:
        label = int(sample.members[LABEL_ENDING])
    except ValueError as error:
        raise BrokenSample(f"its .{LABEL_ENDING} member is not a number") from error
    if not 0 <= label < num_classes:
        raise BadInput(
            f"sample {sample.key} has class id {label}, outside data.num_classes {num_classes}"
        )
    return decode_image(encoded, channels, resolution), label
