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


def restated(image: Image.Image, side: int) -> np.ndarray:
    """guided-diffusion's `center_crop_arr`, in other words, on a picture that is open already."""
    width, height = image.size
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.BOX)
    factor = side / min(width, height)
    width, height = round(width * factor), round(height * factor)
    pixels = np.array(image.resize((width, height), resample=Image.BICUBIC))
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
