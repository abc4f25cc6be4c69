"""Pictures of a checkpoint's samples, as files."""

from collections.abc import Sequence

import torch

from cat_ray.checkpoint.read import load_generator, resolve
from cat_ray.checkpoint.retain import lease
from cat_ray.errors import BadInput
from cat_ray.evaluation.grid import grid, to_image, to_png
from cat_ray.evaluation.sampling import (
    SAMPLING_BATCH,
    Truncation,
    check_classes,
    class_means,
    latents,
    sample_stages,
    to_pixels,
)
from cat_ray.storage import Location

# They are in memory together, for the grid.
MOST_PICTURES = 10_000


def write_pictures(
    checkpoint: Location,
    out: Location,
    classes: Sequence[int] | None,
    count: int,
    seed: int,
    decay: float | None,
    truncation: float = 0.0,
) -> int:
    """Writes `grid.png`, a row for each class, and a PNG for each sample; returns how many.

    The latent of a picture is a function of the seed and its column, so that the columns of the
    grid share a latent. `truncation` is how far styles are drawn to the mean of their class.

    Raises:
        BadInput: a class doesn't exist, or the folder isn't empty.
    """
    place = resolve(checkpoint)
    if not out.is_empty():
        raise BadInput(f"{out.uri} isn't empty: choose another --out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with lease(place):
        generator = load_generator(place, decay, device)
    shape = generator.shape
    chosen = list(range(shape.num_classes)) if classes is None else list(classes)
    check_classes(chosen, shape.num_classes)
    if len(chosen) * count > MOST_PICTURES:
        raise BadInput(
            f"{len(chosen) * count:,} pictures are more than {MOST_PICTURES:,}: a job, such as "
            "jobs/sample.yaml, shares them out among processes"
        )
    z = latents(seed, range(count), shape.latent_width).repeat(len(chosen), 1)
    labels = torch.tensor(chosen).repeat_interleave(count)
    drawn = Truncation(truncation, class_means(generator, device)) if truncation else None
    parts = zip(z.split(SAMPLING_BATCH), labels.split(SAMPLING_BATCH), strict=True)
    pixels = torch.cat(
        [to_pixels(sample_stages(generator, *part, device, drawn)[-1]) for part in parts]
    )
    for place_in_grid, picture in enumerate(pixels):
        label, column = divmod(place_in_grid, count)
        name = f"class-{chosen[label]:04d}-seed-{seed}-{column:03d}.png"
        (out / name).write(to_png(to_image(picture)))
    (out / "grid.png").write(to_png(to_image(grid(pixels, count))))
    return len(pixels)
