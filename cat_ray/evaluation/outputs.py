"""What is left of samples: a contact sheet, and the forms asked for."""

from cat_ray.data.index import INDEX_NAME
from cat_ray.data.indexing import index_shards
from cat_ray.data.latent_shape import IMAGE_CHANNELS
from cat_ray.errors import BadInput
from cat_ray.evaluation.copies import png_place, read_pixels
from cat_ray.evaluation.grid import grid, to_image, to_png
from cat_ray.evaluation.npz import write_images
from cat_ray.evaluation.sample_plan import SHEET_IMAGES, SamplePlan
from cat_ray.evaluation.sampling import class_labels

SHEET, NPZ = ".png", ".npz"
SHEET_COLUMNS = 10


def are_there(plan: SamplePlan) -> bool:
    """Whether the file that tells of them, and all that was asked for beside it, is whole."""
    copies = plan.samples.copies
    places = [plan.place(), plan.place(SHEET)]
    if plan.job.output.npz:
        places.append(plan.place(NPZ))
    if copies.png is not None:
        places.append(png_place(copies.png, plan.samples.count - 1))
    if copies.shards is not None:
        places.append(copies.shards / INDEX_NAME)
    return all(place.exists() for place in places)


def write_outputs(plan: SamplePlan) -> None:
    """Makes of the finished ranges what PNG files don't need; Ray must be connected.

    Raises:
        BadInput: the storage fails.
    """
    store, copies = plan.samples, plan.samples.copies
    first = read_pixels(store.folder, store.ranges()[0])[:SHEET_IMAGES]
    plan.place(SHEET).write(to_png(to_image(grid(first, SHEET_COLUMNS))))
    if plan.job.output.npz:
        _write_npz(plan)
    if copies.shards is not None:
        classes = plan.config.data.num_classes
        problems = index_shards(copies.shards, (), classes, False).problems
        if problems:
            raise BadInput(f"the samples' shards are damaged, delete them: {'; '.join(problems)}")


def _write_npz(plan: SamplePlan) -> None:
    """The samples in ADM's format, which knows colours only."""
    store, asked = plan.samples, plan.job.samples
    parts = (
        read_pixels(store.folder, numbers)
        .expand(-1, IMAGE_CHANNELS, -1, -1)
        .permute(0, 2, 3, 1)
        .numpy()
        for numbers in store.ranges()
    )
    classes = plan.config.data.num_classes
    labels = class_labels(asked.labels, asked.seed, range(asked.count), classes)
    with plan.place(NPZ).written() as file:
        shape = (asked.count, plan.side, plan.side, IMAGE_CHANNELS)
        write_images(file, shape, parts, labels.numpy())
