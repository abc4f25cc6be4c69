"""Which images are opened, and that their size is looked at before anything is allocated."""

import io
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cat_ray.data import image_file
from cat_ray.data.crop import center_crop
from cat_ray.data.decode import decode_image
from cat_ray.data.image_file import (
    JPEG_SCAN,
    MAX_PIXELS,
    MAX_WEBP_PIXELS,
    BrokenSample,
    _scans,
    open_image,
    opened_image,
)

SIDE = 8


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n0 0 32 32 rectfill\n"


def decoded(content: bytes, channels: int = 3, crop: bool = True) -> np.ndarray:
    out = np.empty((SIDE, SIDE, channels), np.uint8)
    decode_image(content, channels, SIDE, crop, out)
    return out


# Formats.


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_file_is_opened_as_what_its_content_is(kind):
    with opened_image(encode(PICTURE, kind)) as image:
        assert (image.format, image.size) == (kind, (SIDE, SIDE))


OTHERS = ["BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "PDF", "IM", "MSP"]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_no_other_format_of_pillow_is_opened(kind, channels):
    content = encode(PICTURE.convert("1") if kind == "MSP" else PICTURE, kind)
    with pytest.raises(BrokenSample, match="not of the formats JPEG, PNG, WEBP or GIF"):
        decoded(content, channels)


def test_no_process_is_started_for_an_image(monkeypatch):
    started: list[object] = []

    def start(*arguments: object, **named: object) -> None:
        started.append(arguments)
        raise OSError("not found")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("os.system", start)
    Image.init()
    for channels in (1, 3):
        with pytest.raises(BrokenSample, match="not of the formats"):
            decoded(EPS, channels)
    assert not started


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError(""), MemoryError(), EOFError("two\nlines")]
)
def test_whatever_pillow_raises_is_a_broken_sample_in_one_line(monkeypatch, error):
    def load(self: Image.Image) -> None:
        raise error

    monkeypatch.setattr(image_file.PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(BrokenSample, match="not a readable image") as caught:
        open_image(encode(PICTURE, "PNG"), 3)
    assert "\n" not in str(caught.value)


# Sizes.


def png_of(width: int, height: int) -> bytes:
    """A PNG that tells of a size and holds nothing else."""
    head = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + b"\x08\2\0\0\0"
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + zlib.crc32(head).to_bytes(4) + b"\0\0\0\0IDAT"


def jpeg_of(width: int, height: int) -> bytes:
    content = encode(PICTURE, "JPEG")
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + height.to_bytes(2) + width.to_bytes(2) + content[at + 4 :]


def gif_of(width: int, height: int) -> bytes:
    size = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    return b"GIF89a" + size + encode(PICTURE, "GIF")[10:]


def webp_of(width: int, height: int) -> bytes:
    """With a canvas, as animations have it."""
    body = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0" + body + bytes(20)


LARGE = {
    "JPEG": jpeg_of(65_500, 65_500),
    "JPEG just beyond": jpeg_of(8_193, 8_192),
    "PNG": png_of(2**31 - 1, 2**31 - 1),
    "PNG just beyond": png_of(MAX_PIXELS + 1, 1),
    "GIF": gif_of(65_535, 65_535),
    "WEBP": webp_of(2**24, 200),
    "WEBP just beyond": webp_of(MAX_WEBP_PIXELS // 4 + 1, 4),
}


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", [True, False])
def test_the_limit_of_pixels_comes_before_every_decoder(monkeypatch, case, channels, crop):
    called: list[object] = []

    def decode(*arguments: object, **named: object) -> None:
        called.append(arguments)
        raise MemoryError

    monkeypatch.setattr("cat_ray.data.decode.simplejpeg.decode_jpeg", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    monkeypatch.setattr("PIL.WebPImagePlugin._webp.WebPAnimDecoder", decode)
    with pytest.raises(BrokenSample, match=r"more than (67,108,864|33,554,432)"):
        decoded(LARGE[case], channels, crop)
    assert not called


def test_the_size_of_every_kind_of_webp_is_read_from_its_header():
    side = Image.new("RGB", (300, 7))
    for options in ({}, {"lossless": True}, {"save_all": True, "append_images": [side.rotate(90)]}):
        assert image_file._webp_size(encode(side, "WEBP", **options)) == (300, 7)
    assert image_file._webp_size(encode(side.convert("RGBA"), "WEBP")) == (300, 7)
    assert image_file._webp_size(b"RIFF....WEBP") == (0, 0)


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from cat_ray.data.decode import decode_image
from cat_ray.data.image_file import BrokenSample
content = sys.stdin.buffer.read()
for crop in (True, False):
    for channels in (1, 3):
        try:
            decode_image(content, channels, 32, crop, np.empty((32, 32, channels), np.uint8))
        except BrokenSample as error:
            assert "more than" in str(error), error
        else:
            raise AssertionError("it was decoded")
# ru_maxrss would begin with the peak of the process that started this one.
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print(int(peak.split()[1]) * 1024)
"""


def test_a_jpeg_that_tells_of_65500_pixels_a_side_takes_less_than_half_a_gigabyte():
    result = subprocess.run(
        [sys.executable, "-c", MEASURE], input=LARGE["JPEG"], capture_output=True, check=True
    )
    assert int(result.stdout) < 5 * 10**8


def test_a_progressive_jpeg_of_thousands_of_scans_is_a_broken_sample():
    content = encode(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True, quality=5)
    scan = content[content.rindex(b"\xff\xda") : -2]
    for channels in (1, 3):
        with pytest.raises(BrokenSample, match="too many scans"):
            decoded(content[:-2] + scan * 90 + content[-2:], channels)
        decoded(content, channels)


@pytest.mark.parametrize(
    ("options", "scans"),
    [
        ({}, 1),
        ({"comment": JPEG_SCAN * 99, "icc_profile": JPEG_SCAN * 99}, 1),
        ({"progressive": True}, 10),
        ({"optimize": True, "restart_marker_rows": 1}, 1),
    ],
)
def test_the_scans_of_a_jpeg_are_counted_where_there_can_be_many(options, scans):
    assert _scans(encode(PICTURE, "JPEG", **options)) == scans
    assert _scans(encode(PICTURE, "JPEG", **options)[:300]) <= 198


def test_scans_of_single_components_are_counted_whatever_the_frame():
    content = encode(PICTURE, "JPEG")
    at = content.index(JPEG_SCAN)
    one = content[: at + 4] + b"\1" + content[at + 5 :]
    assert _scans(one + JPEG_SCAN * 7) == 8
    assert _scans(content + JPEG_SCAN * 7) == 1


@pytest.mark.parametrize(("width", "height"), [(1, 10**6), (10**6, 1), (3, 3 * 10**6)])
def test_a_picture_too_narrow_to_be_scaled_is_a_broken_sample(width, height):
    with pytest.raises(BrokenSample, match="too narrow"):
        center_crop(Image.new("L", (width, height)), 256)


# Depth.

LEVELS = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_16_bit_grey_png_keeps_its_levels(channels):
    found = np.asarray(open_image(encode(Image.fromarray(LEVELS), "PNG"), channels)).astype(int)
    for plane in found.reshape(64, 64, channels).transpose(2, 0, 1):
        assert np.abs(plane - (LEVELS >> 8)).max() <= 1


def test_a_float_tiff_that_is_called_a_png_is_a_broken_sample():
    content = encode(Image.fromarray((LEVELS / 65535).astype(np.float32)), "TIFF")
    with pytest.raises(BrokenSample, match="not of the formats"):
        open_image(content, 3)
