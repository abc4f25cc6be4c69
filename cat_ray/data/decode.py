"""A sample's bytes to what is trained on: pixels and a class."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from cat_ray.data.crop import center_crop
from cat_ray.data.image_file import JPEG_START, BrokenSample, check_size, open_image, opened_image
from cat_ray.data.tar import RawSample
from cat_ray.errors import BadInput
from cat_ray.json_text import parse_json

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
LABEL_ENDING, JSON_ENDING = "cls", "json"
LABEL_KEYS = ("label", "cls", "class", "class_id")
DIGITS = 18
WHOLE_NUMBER = re.compile(rf"\s*[+-]?[0-9]{{1,{DIGITS}}}\s*")
# Of a class in a .json member, or a text that is no number, so much is shown.
SHOWN = 40
THREE_COMPONENTS = "YCbCr"
# What libjpeg says where a file was cut and an end put behind it; it makes the rest grey.
CUT = "premature end of data"


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
    except Exception:
        # Pillow tells more of what is wrong, and reads some that are a little damaged.
        return False
    fits = (height, width) == out.shape[:2]
    if space != THREE_COMPONENTS or not (fits or crop):
        return False
    check_size(width, height, content)
    try:
        pixels = simplejpeg.decode_jpeg(content, colorspace="RGB", buffer=out if fits else None)
    except Exception as error:
        _check_is_whole(error)
        return False
    if not fits:
        out[:] = np.asarray(center_crop(Image.fromarray(pixels), out.shape[0]))
    return True


def check_decodes(content: bytes) -> None:
    """Decodes an image of any size, only to see whether it can be.

    Raises:
        BrokenSample: it can't, or a part of it is missing.
    """
    with opened_image(content) as image:
        if image.format == "JPEG":
            try:
                simplejpeg.decode_jpeg(content)
                return
            except Exception as error:
                _check_is_whole(error)
    # As above: what simplejpeg refuses, Pillow may read.
    open_image(content, 3)


def _check_is_whole(error: Exception) -> None:
    if CUT in str(error):
        raise BrokenSample("not a readable image (a part of it is missing)") from error


def class_of(members: Mapping[str, bytes]) -> int:
    """The class id of a sample: its .cls member, or the label in its .json.

    Raises:
        BrokenSample: it has neither, or what it has is no number.
    """
    if LABEL_ENDING in members:
        text = members[LABEL_ENDING]
    elif JSON_ENDING in members:
        try:
            values = parse_json(members[JSON_ENDING])
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
    return _class_id(text)


def _class_id(value: Any) -> int:
    """A whole number, or its digits: what Python makes of 0.7, true and 1_0 is none."""
    if isinstance(value, bytes):
        value = value.decode("ascii", errors="replace")
    if isinstance(value, str) and WHOLE_NUMBER.fullmatch(value):
        return int(value)
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if whole and abs(value) < 10**DIGITS:
        return int(value)
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
    raise BrokenSample(f"its class {shown} is not a number")


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
