"""Encoded images: which formats are opened, and how large they may be.

Shards come from anywhere. Pillow knows some forty formats, and opens EPS by starting Ghostscript.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

# By content, whatever a file is called. GIF is here because files named .jpeg often are GIFs.
PLUGINS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    WebPImagePlugin.WebPImageFile,
    GifImagePlugin.GifImageFile,
)
FORMATS = tuple(plugin.format for plugin in PLUGINS)
NAMES = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
# A fifth of a GB in RGB. A decoder of WEBP holds five copies of all pixels.
MAX_PIXELS, MAX_WEBP_PIXELS = 2**26, 2**25
# A decoder goes over all pixels for each scan; progressive JPEGs have about ten.
JPEG_START, JPEG_SCAN, JPEG_FRAMES = b"\xff\xd8\xff", b"\xff\xda", (b"\xff\xc0", b"\xff\xc1")
MAX_SCANNED_PIXELS = 16 * MAX_PIXELS
MODES = {1: "L", 3: "RGB"}
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")

# What Pillow warns of is refused here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BrokenSample(Exception):
    """A sample that can't be decoded; the message says which and why."""


def check_size(width: int, height: int, content: bytes = b"", max_pixels: int = MAX_PIXELS) -> None:
    """Compares an image's size with what may be decoded; call it before anything is allocated.

    Args:
        width: as its header tells.
        height: likewise.
        content: of a JPEG, all of it.
        max_pixels: how many there may be.

    Raises:
        BrokenSample: it is too large.
    """
    if width * height > max_pixels:
        raise BrokenSample(
            f"not a readable image ({width:,} x {height:,} pixels, more than {max_pixels:,})"
        )
    if content and _scans(content) * width * height > MAX_SCANNED_PIXELS:
        raise BrokenSample("not a readable image (a JPEG of too many scans)")


@contextmanager
def opened_image(content: bytes) -> Iterator[Image.Image]:
    """An encoded image as Pillow opens it; only its header is read until more is asked for.

    Raises:
        BrokenSample: it is no readable image of these formats, or what is done with it shows so.
    """
    try:
        if content[:4] == b"RIFF":
            # Pillow's decoder of WEBP takes memory for all pixels as it is opened.
            check_size(*_webp_size(content), max_pixels=MAX_WEBP_PIXELS)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            jpeg = content[:3] == JPEG_START
            check_size(*image.size, content=content if jpeg else b"")
            yield image
    except BrokenSample:
        raise
    except Image.DecompressionBombError as error:
        # Pillow has a limit of its own, twice as large.
        raise BrokenSample(f"not a readable image (more than {MAX_PIXELS:,} pixels)") from error
    except Image.UnidentifiedImageError as error:
        # Pillow's words hold an address in memory.
        raise BrokenSample(f"not a readable image (not of the formats {NAMES})") from error
    except Exception as error:
        # Pillow raises whatever its parsers stumble over.
        why = str(error).split("\n", 1)[0] or type(error).__name__
        raise BrokenSample(f"not a readable image ({why})") from error


def open_image(content: bytes, channels: int) -> Image.Image:
    """A whole encoded image in grey (1 channel) or RGB (3).

    As ADM does it, the orientation that a camera wrote beside the pixels is not looked at.

    Raises:
        BrokenSample: it isn't a readable image.
    """
    with opened_image(content) as image:
        if image.mode in SIXTEEN_BIT:
            # Pillow would clip each value at 255.
            pixels = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            pixels = pixels.convert(MODES[channels])
        else:
            pixels = image.convert(MODES[channels])
    # Colour profiles and the like would be written again with the pixels.
    pixels.info.clear()
    return pixels


def _scans(content: bytes) -> int:
    """How many scans of a JPEG a decoder goes through, at most.

    To count them takes a tenth of what decoding does. It isn't needed where the frame is a
    sequential one and the first scan has all of its components: a decoder stops there.
    """
    at, components = 2, 0
    while content[at : at + 1] == b"\xff" and len(content) > at + 9:
        mark = content[at : at + 2]
        if mark in JPEG_FRAMES:
            components = content[at + 9]
        elif mark == JPEG_SCAN:
            return 1 if content[at + 4] == components else content.count(JPEG_SCAN)
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return content.count(JPEG_SCAN)


def _webp_size(content: bytes) -> tuple[int, int]:
    """Width and height of a WEBP's canvas; 0 where there is none, for Pillow to say why."""
    kind, data = content[12:16], content[20:30]
    if kind == b"VP8X" and len(data) == 10:
        return 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
    if kind == b"VP8L" and len(data) >= 5:
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(data) == 10:
        width, height = struct.unpack("<HH", data[6:10])
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0
