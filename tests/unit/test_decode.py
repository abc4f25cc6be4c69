"""From a sample's bytes to pixels and a class, and what becomes of those that can't be read."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cat_ray.data import decode as module
from cat_ray.data.decode import (
    BrokenSample,
    class_of,
    decode_image,
    decode_sample,
    encoded_image,
    open_image,
)
from cat_ray.data.tar import RawSample
from cat_ray.errors import BadInput

SIDE = 8
few = settings(max_examples=40, deadline=None, derandomize=True)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


def decoded(content: bytes, channels: int, side: int = SIDE, crop: bool = False) -> np.ndarray:
    """`[side, side, channels]`, in memory that was something else before."""
    out = np.full((side, side, channels), 77, dtype=np.uint8)
    decode_image(content, channels, side, crop, out)
    return out


def picture() -> np.ndarray:
    """A smooth RGB image that is no two ways symmetric, `[SIDE, SIDE, 3]`."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.stack([30 * rows, 20 * columns, 10 * rows + 15 * columns], axis=2).astype(np.uint8)


def luminance(pixels: np.ndarray) -> np.ndarray:
    return pixels @ [0.299, 0.587, 0.114]


# Decoding an image.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_a_png_is_decoded_exactly_whatever_its_mode(mode, channels):
    pixels = picture()
    if mode == "L":
        pixels[:] = pixels[:, :, :1]
    # 64 pixels fit a palette of 256 colours without loss.
    image = Image.fromarray(pixels)
    image = image.quantize(256, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)
    expected = np.asarray(image.convert("RGB")) if mode == "P" else pixels
    assert np.abs(expected.astype(int) - pixels).max() <= 2
    found = decoded(encode(image), channels)
    if channels == 3:
        assert np.array_equal(found, expected)
    else:
        assert np.abs(found[..., 0] - luminance(expected)).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_decoded_closely_whatever_its_mode(mode, channels):
    image = Image.fromarray(picture()).convert(mode)
    found = decoded(encode(image, "JPEG", quality=100, subsampling=0), channels)
    expected = np.asarray(image.convert("RGB"))
    if channels == 3:
        assert np.abs(found.astype(int) - expected).max() <= 6
    else:
        assert np.abs(found[..., 0] - luminance(expected)).max() <= 6


# JPEGs that don't go through Pillow.


def photo(side: int, seed: int = 0) -> Image.Image:
    """Edges, slopes and noise, in which each shortcut of a decoder would show."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] * (255 / side)
    slopes = np.stack([rows, columns, 255 - rows], axis=2)
    noise = random.normal(0, 30, (side, side, 3))
    noise[side // 3 : side // 2] += 120 * (random.integers(0, 2, (1, side, 1)) - 0.5)
    return Image.fromarray((slopes + noise).clip(0, 255).astype(np.uint8))


def rotated() -> Image.Exif:
    """What a camera that was held upright writes beside the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "low quality": {"quality": 20},
    "best quality": {"quality": 100, "subsampling": 0},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": 0},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "rotated by EXIF": {"exif": rotated()},
    "in RGB": {"keep_rgb": True},
    "with a colour profile": {"icc_profile": b"profile" * 20},
    "with a comment": {"comment": b"cat" * 50},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
}


@pytest.mark.parametrize("side", [8, 17, 64, 255])
@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_has_the_pixels_that_pillow_gives_it(kind, side, channels):
    options = dict(JPEGS[kind])
    image = photo(side).convert(options.pop("mode", "RGB"))
    content = encode(image, "JPEG", **options)
    expected = Image.open(io.BytesIO(content)).convert({1: "L", 3: "RGB"}[channels])
    assert np.array_equal(decoded(content, channels, side).squeeze(), np.asarray(expected))


@pytest.mark.parametrize(
    ("kind", "direct"), [("4:2:0", True), ("progressive", True), ("grey", False), ("CMYK", False)]
)
def test_a_colour_jpeg_takes_the_short_way(monkeypatch, kind, direct):
    options = dict(JPEGS[kind])
    content = encode(photo(32).convert(options.pop("mode", "RGB")), "JPEG", **options)
    taken, really = [], simplejpeg.decode_jpeg

    def decode_jpeg(*arguments: Any, **named: Any) -> np.ndarray:
        taken.append(True)
        return really(*arguments, **named)

    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", decode_jpeg)
    decoded(content, 3, 32)
    assert bool(taken) is direct


@few
@given(st.integers(0, 5), st.sampled_from([0, 1, 2]), st.booleans(), st.integers(1, 100))
def test_any_colour_jpeg_has_the_pixels_that_pillow_gives_it(seed, subsampling, flow, quality):
    content = encode(
        photo(33, seed), "JPEG", subsampling=subsampling, progressive=flow, quality=quality
    )
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(decoded(content, 3, 33), expected)


def test_a_png_that_is_called_a_jpeg_is_decoded_as_what_it_is():
    image = photo(16)
    sample = RawSample("k", {"jpg": encode(image), "cls": b"3"})
    out = np.empty((16, 16, 3), np.uint8)
    assert decode_sample(sample, 10, False, out) == 3
    assert np.array_equal(out, np.asarray(image))


@pytest.mark.parametrize("crop", [True, False])
def test_orientation_beside_the_pixels_is_not_looked_at_on_either_way(crop):
    # ADM's code takes the pixels as they lie in the file.
    content = encode(photo(24), "JPEG", exif=rotated())
    plain = encode(photo(24), "JPEG")
    assert np.array_equal(decoded(content, 3, 24, crop), decoded(plain, 3, 24, crop))
    assert np.array_equal(decoded(content, 3, 10, True), decoded(plain, 3, 10, True))


def test_a_picture_keeps_nothing_that_lay_beside_its_pixels():
    content = encode(photo(8), "JPEG", exif=rotated(), comment=b"cat", icc_profile=b"profile")
    assert open_image(content, 3).info == {}


# Noise, so that no byte is there in vain.
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
PNG, JPEG = encode(NOISE), encode(NOISE, "JPEG")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"text",
        PNG[: len(PNG) // 2],
        PNG[:-40],
        PNG[:40] + b"\0" * 8 + PNG[48:],
        JPEG[: len(JPEG) // 2],
        JPEG[:4],
        # A frame header that claims 65,280 x 65,280 pixels.
        JPEG.replace(b"\xff\xc0\0\x11\x08\0\x08\0\x08", b"\xff\xc0\0\x11\x08\xff\0\xff\0"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_that_are_no_whole_image_are_a_broken_sample(content, channels):
    with pytest.raises(BrokenSample, match="not a readable image"):
        decoded(content, channels)


@few
@given(st.sampled_from([PNG, JPEG]), st.data())
def test_damage_gives_a_picture_or_a_broken_sample_and_nothing_else(content, data):
    at = data.draw(st.integers(0, 150))
    damaged = content[:at] + data.draw(st.binary(max_size=6)) + content[at + 3 :]
    with contextlib.suppress(BrokenSample):
        decoded(damaged, 3)


@pytest.mark.parametrize(("width", "height"), [(8, 9), (9, 8), (16, 16), (4, 4)])
def test_an_image_of_another_size_is_a_broken_sample(width, height):
    content = encode(Image.new("RGB", (width, height)))
    with pytest.raises(BrokenSample, match=f"{width} x {height}, not 8 x 8"):
        decoded(content, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("width", "height"), [(8, 9), (9, 8), (16, 16), (4, 4), (8, 8)])
def test_an_image_of_another_size_is_cropped_where_that_is_asked_for(width, height, kind):
    content = encode(Image.new("RGB", (width, height), (9, 99, 199)), kind, quality=100)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[0, 0]
    # A scale of one colour is that colour.
    assert np.array_equal(decoded(content, 3, crop=True), np.broadcast_to(expected, (8, 8, 3)))


# Decoding a sample.


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp"])
@pytest.mark.parametrize(("written", "label"), [(b"0", 0), (b"9", 9), (b" 3\n", 3)])
def test_a_sample_is_its_image_and_its_class(ending, written, label):
    kind = {"png": "PNG", "webp": "WEBP"}.get(ending, "JPEG")
    members = {ending: encode(Image.new("L", (SIDE, SIDE), 100), kind), "cls": written}
    image = np.empty((SIDE, SIDE, 1), np.uint8)
    assert decode_sample(RawSample("k", members), 10, False, image) == label
    assert np.abs(image.astype(int) - 100).max() <= 1


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"cls": b"1"}, "has no image"),
        ({"png": PNG}, r"no class: a \.cls member"),
        ({"txt": b"x", "cls": b"1"}, "has no image"),
        ({"png": PNG, "cls": b"cat"}, "not a number"),
        ({"png": PNG, "cls": b"1_0"}, "not a number"),
        ({"png": PNG, "cls": b"0.7"}, "not a number"),
        ({"png": PNG, "cls": b"1" * 19}, "not a number"),
        ({"png": PNG, "cls": "٣".encode()}, "not a number"),
        ({"png": PNG, "cls": b""}, "not a number"),
        ({"png": PNG, "cls": b"\xff"}, "not a number"),
        ({"png": b"", "cls": b"1"}, "not a readable image"),
    ],
)
def test_a_sample_without_image_or_class_is_broken(members, told):
    with pytest.raises(BrokenSample, match=told):
        decode_sample(RawSample("k", members), 10, False, np.empty((SIDE, SIDE, 3), np.uint8))


@pytest.mark.parametrize("label", [10, 11, -1, 10**12])
def test_a_class_outside_the_models_is_bad_input_and_no_broken_sample(label):
    # To skip such samples would hide that the whole configuration is wrong.
    sample = RawSample("cat7", {"png": PNG, "cls": str(label).encode()})
    with pytest.raises(BadInput, match=rf"cat7 has class id {label}, outside data\.num_classes 10"):
        decode_sample(sample, 10, False, np.empty((SIDE, SIDE, 3), np.uint8))


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"cls": b"7"}, 7),
        ({"json": b'{"label": 7}'}, 7),
        ({"json": b'{"cls": "7", "caption": "a cat"}'}, 7),
        ({"json": b'{"class": 7}'}, 7),
        ({"json": b'{"class": 7.0}'}, 7),
        ({"json": b'{"class_id": 0}'}, 0),
        ({"json": b'{"label": 7, "class_id": 3}'}, 7),
        # The class that stands for itself counts.
        ({"cls": b"7", "json": b'{"label": 3}'}, 7),
        ({"cls": b"7", "json": b"{"}, 7),
    ],
)
def test_a_class_is_that_of_the_cls_member_or_the_label_in_the_json_one(members, label):
    assert class_of(members) == label


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", r"its \.json member can't be read"),
        (b"\xff", r"its \.json member can't be read"),
        (b"{}", "no class"),
        (b'{"caption": "cat"}', "no class"),
        (b'{"label": null}', "no class"),
        (b'{"label": "cat"}', "not a number"),
        (b'{"label": [1]}', "not a number"),
        (b'{"label": Infinity}', "not a number"),
        (b'{"label": 0.7}', "not a number"),
        (b'{"label": 3.0001}', "not a number"),
        (b'{"label": NaN}', "not a number"),
        (b'{"label": true}', "not a number"),
        (b'{"label": "1_0"}', "not a number"),
        (b'{"label": 1e300}', "not a number"),
        (b'{"label": ' + b"9" * 4000 + b"}", r"9{39,}\.\.\. is not a number"),
        (b'{"label": ' + b"9" * 5000 + b"}", r"its \.json member can't be read"),
        (b"[" * 100_000, r"its \.json member can't be read"),
        (b"[]", "holds no keys"),
        (b"3", "holds no keys"),
        (b'"label"', "holds no keys"),
    ],
)
def test_a_json_member_without_a_class_is_a_broken_sample(content, told):
    with pytest.raises(BrokenSample, match=told):
        class_of({"json": content})


def test_the_image_is_the_first_known_ending_whatever_lies_beside_it():
    assert encoded_image({"txt": b"a", "seg.png": b"b", "webp": b"c", "png": b"d"}) == b"d"
