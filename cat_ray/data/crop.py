"""The centre crop with which ImageNet-256 and -512 are made everywhere."""

from PIL import Image

from cat_ray.data.image_file import MAX_PIXELS, BrokenSample


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture, `side` pixels wide: ADM's, bit for bit.

    Halved by box averages while its shorter side is at least twice as long as needed, then scaled
    bicubically so that the shorter side fits, then cut (guided-diffusion, `image_datasets.py`,
    `center_crop_arr`).

    Args:
        image: of any mode that Pillow can scale, such as L or RGB.
        side: of the square.

    Raises:
        BrokenSample: it is so narrow that to scale it takes too much memory.
    """
    while min(image.size) >= 2 * side:
        half, box = (image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX
        image = _down(_across(image, half[0], box), half[1], box)
    scale = side / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    if max(width * image.size[1], side * height) > MAX_PIXELS:
        told = f"{image.size[0]:,} x {image.size[1]:,} pixels can't be scaled"
        raise BrokenSample(f"{told} to {side:,} x {side:,}: it is too narrow")
    left, top = (width - side) // 2, (height - side) // 2
    image = _across(image, width, Image.Resampling.BICUBIC)
    # Columns that are cut off needn't be scaled downwards.
    image = image.crop((left, 0, left + side, image.size[1]))
    return _down(image, height, Image.Resampling.BICUBIC).crop((0, top, side, top + side))


# Each direction is rounded to bytes, so their order shows in the pixels. Pillow scaled across first
# when ADM's were made, as is done here; since Pillow 13 it begins with whatever is quicker.
def _across(image: Image.Image, width: int, resample: Image.Resampling) -> Image.Image:
    return image.resize((width, image.size[1]), resample=resample)


def _down(image: Image.Image, height: int, resample: Image.Resampling) -> Image.Image:
    return image.resize((image.size[0], height), resample=resample)
