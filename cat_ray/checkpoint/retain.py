"""Which checkpoints are kept, and which are in use and can't go."""

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from cat_ray.checkpoint.layout import FOLDER, MANIFEST, read_whole
from cat_ray.errors import BadInput
from cat_ray.storage import Location

LEASE_SECONDS = 3600.0


def images_of(name: str) -> int:
    """Images seen of a checkpoint, from its folder's name."""
    return int(name.split("-")[1])


def kept(images: list[int], keep: int, every_images: int | None) -> set[int]:
    """Which of the checkpoints at these numbers of images stay, the numbers in rising order.

    The newest `keep` do, and the first one at or past each multiple of `every_images`.
    """
    staying = set(images[-keep:])
    if every_images is not None:
        seen = 0
        for count in images:
            if count // every_images > seen:
                staying.add(count)
                seen = count // every_images
    return staying


def drop_old(run: Location, keep: int, every_images: int | None = None) -> None:
    """Deletes the checkpoints that `kept` leaves out and nobody holds a lease of.

    What was never committed goes as well when a committed one is newer.
    """
    folders = (run / FOLDER).folders()
    complete = [folder for folder in folders if read_whole(folder) is not None]
    if not complete:
        return
    newest = images_of(complete[-1].name)
    staying = kept([images_of(folder.name) for folder in complete], keep, every_images)
    for folder in folders:
        images = images_of(folder.name)
        old = images not in staying if folder in complete else images < newest
        if old and not leased(folder):
            _delete(folder)


@contextmanager
def lease(checkpoint: Location, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Keeps a checkpoint from being deleted for as long as the block lasts, at most so long.

    Raises:
        BadInput: the checkpoint is gone already, or its storage can't be written to.
    """
    place = checkpoint / f"lease-{uuid.uuid4().hex[:8]}.json"
    place.write(json.dumps({"until": time.time() + seconds}).encode())
    try:
        if not (checkpoint / MANIFEST).exists():
            raise BadInput(f"{checkpoint.uri} was deleted while it was being opened: try again")
        yield
    finally:
        place.delete()


def leased(checkpoint: Location) -> bool:
    """Whether somebody uses the checkpoint now."""
    names = [name for name in checkpoint.sizes() if name.startswith("lease-")]
    return any(
        json.loads((checkpoint / name).read())["until"] > time.time()
        for name in names
        if (checkpoint / name).exists()
    )


def _delete(folder: Location) -> None:
    # Without it the rest is no checkpoint, should the deletion break off.
    manifest = (folder / MANIFEST).read() if (folder / MANIFEST).exists() else None
    (folder / MANIFEST).delete()
    if manifest is not None and leased(folder):
        # A reader looks for the manifest after it wrote its lease: one of the two sees the other.
        (folder / MANIFEST).write(manifest)
        return
    folder.delete_folder()
