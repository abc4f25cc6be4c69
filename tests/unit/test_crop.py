"""ADM's centre crop: the pixels that the published code gives, on pictures of any shape."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cat_ray.data.crop import center_crop
from cat_ray.data.decode import decode_image, open_image

some = settings(max_examples=80, deadline=None, derandomize=True)

# (width, height, side).
SHAPES = [
    (500, 375, 256),
    (375, 500, 256),
    (256, 256, 256),
    (257, 256, 256),
    (255, 255, 256),
    # Very wide and very tall.
    (2000, 33, 16),
    (33, 2000, 16),
    (3000, 10, 32),
    (10, 3000, 32),
    # Smaller than the side.
    (7, 5, 32),
    (1, 1, 8),
    (31, 40, 32),
    # Twice, four times, and just not.
    (64, 64, 32),
    (128, 128, 32),
    (63, 63, 32),
    (127, 129, 32),
    (65, 131, 32),
    (64, 201, 32),
    (1023, 769, 64),
]


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def scaled_across(pixels: np.ndarray, length: int, kernel, support: float) -> np.ndarray:
    """Pillow's `Resample.c` along the second axis, in integers: weights of 22 bits, a byte out."""
    before = pixels.shape[1]
    if length == before:
        return pixels
    scale = before / length
    stretch = max(scale, 1.0)
    result = np.empty((pixels.shape[0], length, *pixels.shape[2:]), np.uint8)
    for place in range(length):
        center, reach = (place + 0.5) * scale, support * stretch
        first = max(int(center - reach + 0.5), 0)
        last = min(int(center + reach + 0.5), before)
        weights = kernel((np.arange(first, last) - center + 0.5) / stretch)
        weights = weights / weights.sum() * 2**22
        whole = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int64)
        total = np.tensordot(pixels[:, first:last].astype(np.int64), whole, axes=(1, 0))
        result[:, place] = ((total + 2**21) >> 22).clip(0, 255)
    return result


def scaled(pixels: np.ndarray, width: int, height: int, kernel, support: float) -> np.ndarray:
    """Across first, then down: as all Pillows before 13, with which ADM's pixels were made."""
    across = scaled_across(pixels, width, kernel, support)
    return scaled_across(across.swapaxes(0, 1), height, kernel, support).swapaxes(0, 1)


def restated(image: Image.Image, side: int) -> np.ndarray:
    """guided-diffusion's `center_crop_arr`, in other words and without Pillow's scaling."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        pixels = scaled(pixels, width, height, box, 0.5)
    factor = side / min(width, height)
    width, height = round(width * factor), round(height * factor)
    pixels = scaled(pixels, width, height, bicubic, 2.0)
    down, across = (height - side) // 2, (width - side) // 2
    return pixels[down : down + side, across : across + side]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Slopes and noise: no row, column or colour is like another."""
    rows, columns = np.mgrid[:height, :width]
    slopes = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) % 256], axis=2)
    noise = np.random.default_rng(width * height).integers(-40, 41, slopes.shape)
    return Image.fromarray((slopes + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("width", "height", "side"), SHAPES)
def test_a_crop_has_the_published_pixels(width, height, side, mode):
    image = picture(width, height, mode)
    found = center_crop(image, side)
    assert (found.size, found.mode) == ((side, side), mode)
    assert np.array_equal(np.asarray(found), restated(image, side))


@some
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 80))
def test_a_crop_of_any_shape_has_the_published_pixels(width, height, side):
    image = picture(width, height)
    assert np.array_equal(np.asarray(center_crop(image, side)), restated(image, side))


@pytest.mark.parametrize("side", [1, 8, 33])
def test_a_picture_that_fits_is_left_as_it_is(side):
    image = picture(side, side)
    assert np.array_equal(np.asarray(center_crop(image, side)), np.asarray(image))


def test_a_crop_does_not_change_the_picture_that_it_is_of():
    image = picture(100, 80)
    before = image.tobytes()
    center_crop(image, 16)
    assert image.tobytes() == before


@pytest.mark.parametrize(("width", "height"), [(101, 67), (67, 101), (30, 20), (64, 64), (900, 40)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "grey JPEG", "CMYK JPEG", "rotated JPEG"])
def test_a_file_is_cropped_as_the_published_code_does_it(kind, channels, width, height):
    mode = {"grey JPEG": "L", "CMYK JPEG": "CMYK"}.get(kind, "RGB")
    options: dict[str, object] = {}
    if kind == "rotated JPEG":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    content = encode(picture(width, height, mode), kind.split()[-1], **options)
    found = np.empty((32, 32, channels), np.uint8)
    decode_image(content, channels, 32, True, found)
    # The published code takes the pixels as they lie, whatever a camera wrote beside them.
    plain = Image.open(io.BytesIO(content)).convert({1: "L", 3: "RGB"}[channels])
    assert plain.size == (width, height)
    assert np.array_equal(found.squeeze(), restated(plain, 32))
    opened = np.asarray(center_crop(open_image(content, channels), 32))
    assert np.array_equal(found.squeeze(), opened)
