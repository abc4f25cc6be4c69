"""The centre crop with which ImageNet-256 and -512 are made everywhere."""

from PIL import Image


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture, `side` pixels wide: ADM's, bit for bit.

    Halved by box averages while its shorter side is at least twice as long as needed, then scaled
    bicubically so that the shorter side fits, then cut (guided-diffusion, `image_datasets.py`,
    `center_crop_arr`).

    Args:
        image: of any mode that Pillow can scale, such as L or RGB.
        side: of the square.
    """
    while min(image.size) >= 2 * side:
        half = (image.size[0] // 2, image.size[1] // 2)
        image = image.resize(half, resample=Image.Resampling.BOX)
    scale = side / min(image.size)
    fitting = (round(image.size[0] * scale), round(image.size[1] * scale))
    image = image.resize(fitting, resample=Image.Resampling.BICUBIC)
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    return image.crop((left, top, left + side, top + side))
