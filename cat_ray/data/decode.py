"""A sample's bytes to what is trained on: pixels and a class."""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from cat_ray.data.crop import center_crop
from cat_ray.data.tar import RawSample
from cat_ray.errors import BadInput

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
LABEL_ENDING, JSON_ENDING = "cls", "json"
LABEL_KEYS = ("label", "cls", "class", "class_id")
UNREADABLE = (
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
)
MODES = {1: "L", 3: "RGB"}
JPEG_START = b"\xff\xd8\xff"
THREE_COMPONENTS = "YCbCr"


class BrokenSample(Exception):
    """A sample that can't be decoded; the message says which and why."""


@contextmanager
def opened_image(content: bytes) -> Iterator[Image.Image]:
    """An encoded image as Pillow opens it; only its header is read until more is asked for.

    Raises:
        BrokenSample: it isn't a readable image, or what is done with it shows so.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            yield image
    except UnidentifiedImageError as error:
        # Pillow's words hold an address in memory.
        raise BrokenSample("not a readable image (of no known format)") from error
    except UNREADABLE as error:
        raise BrokenSample(f"not a readable image ({error})") from error


def open_image(content: bytes, channels: int) -> Image.Image:
    """A whole encoded image in grey (1 channel) or RGB (3).

    As ADM does it, the orientation that a camera wrote beside the pixels is not looked at.

    Raises:
        BrokenSample: it isn't a readable image.
    """
    with opened_image(content) as image:
        pixels = image.convert(MODES[channels])
    # Colour profiles and the like would be written again with the pixels.
    pixels.info.clear()
    return pixels


def decode_image(
    content: bytes, channels: int, resolution: int, crop: bool, out: np.ndarray
) -> None:
    """Encoded image to `out`, `[resolution, resolution, channels]` uint8.

    Args:
        content: the encoded image.
        channels: 1 or 3.
        resolution: the side wanted.
        crop: an image of another size is cropped as ADM does, not refused.
        out: where to put the pixels.

    Raises:
        BrokenSample: it isn't a readable image, or has another size and `crop` is off.
    """
    if channels == 3 and content[:3] == JPEG_START and _decode_jpeg(content, crop, out):
        return
    image = open_image(content, channels)
    if image.size != (resolution, resolution):
        if not crop:
            width, height = image.size
            raise BrokenSample(f"{width} x {height}, not {resolution} x {resolution}")
        image = center_crop(image, resolution)
    out[:] = np.asarray(image, dtype=np.uint8).reshape(out.shape)


def _decode_jpeg(content: bytes, crop: bool, out: np.ndarray) -> bool:
    """Decodes a colour JPEG of the right size, or one to be cropped; False for any other.

    The pixels are those of Pillow, whose libjpeg-turbo it is as well, without two copies of them.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        fits = (height, width) == out.shape[:2]
        if space != THREE_COMPONENTS or not (fits or crop):
            return False
        pixels = simplejpeg.decode_jpeg(content, colorspace="RGB", buffer=out if fits else None)
    except ValueError:
        # Pillow tells more of what is wrong, and reads some that are a little damaged.
        return False
    if not fits:
        out[:] = np.asarray(center_crop(Image.fromarray(pixels), out.shape[0]))
    return True


def class_of(members: Mapping[str, bytes]) -> int:
    """The class id of a sample: its .cls member, or the label in its .json.

    Raises:
        BrokenSample: it has neither, or what it has is no number.
    """
    if LABEL_ENDING in members:
        text = members[LABEL_ENDING]
    elif JSON_ENDING in members:
        try:
            values = json.loads(members[JSON_ENDING])
        except ValueError as error:
            raise BrokenSample(f"its .{JSON_ENDING} member can't be read ({error})") from error
        if not isinstance(values, dict):
            raise BrokenSample(f"its .{JSON_ENDING} member holds no keys")
        text = next((values[key] for key in LABEL_KEYS if key in values), None)
    else:
        text = None
    if text is None:
        raise BrokenSample(
            f"it has no class: a .{LABEL_ENDING} member, or a .{JSON_ENDING} one with "
            f"{' or '.join(LABEL_KEYS)}"
        )
    try:
        return int(text)
    except (ValueError, TypeError, OverflowError) as error:
        raise BrokenSample(f"its class {text!r} is not a number") from error


def encoded_image(members: Mapping[str, bytes]) -> bytes:
    """The image among a sample's members.

    Raises:
        BrokenSample: there is none.
    """
    for ending in IMAGE_ENDINGS:
        if ending in members:
            return members[ending]
    raise BrokenSample(f"it has no image: a member that ends in .{', .'.join(IMAGE_ENDINGS)}")


def decode_sample(sample: RawSample, num_classes: int, crop: bool, out: np.ndarray) -> int:
    """Puts the image into `out`, `[resolution, resolution, channels]` uint8; returns the class id.

    Raises:
        BrokenSample: a part is missing or unreadable.
        BadInput: the class id is outside `num_classes`.
    """
    label = class_of(sample.members)
    if not 0 <= label < num_classes:
        raise BadInput(
            f"sample {sample.key} has class id {label}, outside data.num_classes {num_classes}"
        )
    decode_image(encoded_image(sample.members), out.shape[2], out.shape[0], crop, out)
    return label
