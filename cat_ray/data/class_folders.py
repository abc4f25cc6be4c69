"""Images in folders of one class each, as ImageNet's lie on disks, or in one folder."""

from collections import Counter
from collections.abc import Mapping

from cat_ray.data.names import SPLITS, counted, ending_of, is_image, named
from cat_ray.data.tree import check_is_no_pointer, check_is_whole, look_below, selected
from cat_ray.data.units import Source, Unit, key_of
from cat_ray.errors import BadInput


def list_class_folders(
    source: Source, left_out: Counter[str]
) -> tuple[list[Unit], tuple[str, ...]]:
    """A unit for each image, and the classes, numbered in the order of the folders' names.

    Images in the folder itself, where there are no folders, are of one class.

    Raises:
        BadInput: a folder has no images, so that it is unclear which number the later ones have, or
            the folders are splits of a data set.
    """
    tree = look_below(source.place, left_out)
    check_is_whole(source.place, tree)
    files = selected(source, tree.files, left_out)
    images = {name: size for name, size in files.items() if is_image(name)}
    left_out.update(ending_of(name) for name in files if name not in images)
    inside = {name: size for name, size in images.items() if "/" in name}
    classes = tree.folders
    if not classes:
        inside, classes = images, (source.place.name,) if images else ()
    elif inside:
        _check_classes(source, classes, inside, left_out)
    elif images:
        raise BadInput(
            f"{source.place.uri} holds images, and folders without any ({named(classes)}): move "
            "the images into a folder for each class, or remove the folders"
        )
    else:
        classes = ()
    if outside := len(images) - len(inside):
        left_out["images outside of class folders"] += outside
    if inside:
        smallest = min(inside, key=lambda name: (inside[name], name))
        check_is_no_pointer(source.place / smallest, inside[smallest])
    label = {name: place for place, name in enumerate(classes)}
    units = [
        Unit(name, 0, inside[name], 1, key_of(name), label.get(name.split("/")[0], 0))
        for name in sorted(inside)
    ]
    return units, classes


def check_are_no_splits(source: Source, classes: tuple[str, ...], ending: str = "") -> None:
    """Refuses what is called train and test as classes.

    Raises:
        BadInput: the classes are splits of a data set.
    """
    splits = [name for name in classes if name.rpartition("/")[2].lower() in SPLITS]
    if len(splits) > 1 or len(splits) == len(classes) == 1:
        raise BadInput(
            f"{source.place.uri} holds the splits {named(splits)} and no classes: set source.uri "
            f"to one of them, such as {source.place.uri}/{splits[0]}{ending}"
        )


def _check_classes(
    source: Source, classes: tuple[str, ...], images: Mapping[str, int], left_out: Counter[str]
) -> None:
    check_are_no_splits(source, classes)
    if empty := set(classes) - {name.split("/")[0] for name in images}:
        others = f" Left out: {counted(left_out)}." if left_out else ""
        raise BadInput(
            f"{source.place.uri}: no images are in {named(empty)}.{others} Classes are numbered in "
            "the order of their folders: add the images, or remove these folders"
        )
    inner = {part for name in images for part in name.split("/")[1:-1]}
    if len(splits := {part for part in inner if part.lower() in SPLITS}) > 1:
        one = max(splits)
        path = next(name.split("/") for name in images if one in name.split("/")[1:-1])
        pattern = "/".join(part if part == one else "*" for part in path)
        raise BadInput(
            f"{source.place.uri}: the class folders hold the splits {named(splits)}. Select one "
            f"with source.pattern, such as {pattern}"
        )
