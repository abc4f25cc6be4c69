"""Which checkpoints are kept, and which are in use and can't go."""

import json
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from cat_ray.checkpoint.layout import (
    DAMAGED,
    FOLDER_FORM,
    LEASE_FORM,
    MANIFEST,
    checkpoint_folders,
    images_of,
    is_own_file,
    parsed,
    read_whole,
)
from cat_ray.checkpoint.records import LONGEST_SHOWN, first_problem
from cat_ray.errors import BadInput, Damaged, ExpectedError, NotFound, printable
from cat_ray.storage import Location

LEASE_SECONDS = 3600.0
# A measurement's lasts a day; the clocks of two machines may differ.
LONGEST_LEASE_SECONDS = 2 * 24 * 3600.0
BEST = "best.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """Until when somebody reads a checkpoint, in unix time."""

    until: FiniteFloat


_LEASE = TypeAdapter(Lease)
_BEST = TypeAdapter(list[str])


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


def drop_old(
    run: Location, keep: int, every_images: int | None = None, committed: Location | None = None
) -> None:
    """Deletes the checkpoints that `kept` leaves out, are not among the best, and nobody holds a
    lease of.

    What was never committed, or is damaged, goes as well when a committed one is newer. A folder
    that holds anything else than a checkpoint's files is left alone, as is every folder with
    another name. Where the storage fails, what is left is deleted the next time.

    Args:
        run: the run's folder.
        keep: how many of the newest stay.
        every_images: beside those, the first at or past each multiple of this stays.
        committed: the checkpoint that the run has come to, the newest one if None. Those ahead of
            it, which the run went back from because they are damaged, count for nothing and stay.
    """
    try:
        _drop_old(run, keep, every_images, committed)
    except Damaged as error:
        logger.warning("%s; until it is restored or removed, no checkpoint is deleted", error)
    except ExpectedError as error:
        logger.warning("%s; old checkpoints are deleted after the next save", error)


def write_best(run: Location, names: list[str]) -> None:
    """Makes the checkpoints of these names stay, beside those that `kept` tells; no others."""
    (run / BEST).write(json.dumps(names).encode())


def read_best(run: Location) -> list[str]:
    """The checkpoints that were measured to be the best, the very best first.

    Raises:
        Damaged: it can't be known which they are.
    """
    try:
        return parsed(run / BEST, _parse_best)
    except NotFound:
        return []


@contextmanager
def lease(checkpoint: Location, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Keeps a checkpoint from being deleted for as long as the block lasts, at most so long.

    Where its storage can't be written to, it is read without, and a warning says so.

    Raises:
        BadInput: the checkpoint is gone already.
    """
    place = checkpoint / f"lease-{uuid.uuid4().hex[:8]}.json"
    try:
        place.write(json.dumps({"until": time.time() + seconds}).encode())
    except ExpectedError as error:
        logger.warning("no lease, a training run may delete what is being read: %s", error)
        yield
        return
    try:
        if not (checkpoint / MANIFEST).exists():
            raise BadInput(f"{checkpoint.uri} was deleted while it was being opened: try again")
        yield
    finally:
        _end(place)


def leased(checkpoint: Location) -> bool:
    """Whether somebody uses the checkpoint now."""
    names = [name for name in checkpoint.sizes() if LEASE_FORM.fullmatch(name)]
    return any(_until(checkpoint / name) > time.time() for name in names)


def _parse_best(content: bytes) -> list[str]:
    try:
        names = _BEST.validate_json(content, strict=True)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error
    if foreign := [name for name in names if not FOLDER_FORM.fullmatch(name)]:
        raise ValueError(f"{foreign[0][:LONGEST_SHOWN]!r} is not the name of a checkpoint's folder")
    return names


def _parse_lease(content: bytes) -> float:
    try:
        until = _LEASE.validate_json(content, strict=True).until
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error
    if until > time.time() + LONGEST_LEASE_SECONDS:
        raise ValueError("no lease is that long")
    return until


def _until(place: Location) -> float:
    """When a lease runs out; 0 if its reader is done by now.

    Of one that says nothing of use it is only known that somebody wrote it: it holds for as long
    as one that was written then.
    """
    try:
        return parsed(place, _parse_lease)
    except NotFound:
        return 0.0
    except Damaged as error:
        written = place.modified()
        if written is None:
            return 0.0
        logger.warning("%s; it holds until it is %.0f s old", error, LEASE_SECONDS)
        return written + LEASE_SECONDS


def _end(place: Location) -> None:
    try:
        place.delete()
    except ExpectedError as error:
        logger.warning("a lease stays until it runs out: %s", error)


def _drop_old(
    run: Location, keep: int, every_images: int | None, committed: Location | None
) -> None:
    folders = checkpoint_folders(run)
    complete = [
        folder
        for folder in folders
        if read_whole(folder) is not None and not (folder / DAMAGED).exists()
    ]
    if not complete:
        return
    newest = images_of((committed or complete[-1]).name)
    # Two groups may have come to the same number, one of them with a damaged checkpoint.
    numbers = sorted({images_of(folder.name) for folder in complete})
    staying = kept([images for images in numbers if images <= newest], keep, every_images)
    best = read_best(run)
    for folder in folders:
        images = images_of(folder.name)
        old = images not in staying if folder in complete else images < newest
        if images <= newest and old and folder.name not in best and not leased(folder):
            _delete(folder)


def _delete(folder: Location) -> None:
    if folder.is_link():
        logger.warning("%s is kept, for it is a link, and may be another run's", folder.uri)
        return
    if foreign := _foreign(folder):
        logger.warning(
            "%s is kept, for it holds %s, which is not cat-ray's: move that elsewhere to have the "
            "checkpoint deleted",
            folder.uri,
            printable(foreign[0]),
        )
        return
    # Without it the rest is no checkpoint, should the deletion break off.
    manifest = (folder / MANIFEST).read() if (folder / MANIFEST).exists() else None
    (folder / MANIFEST).delete()
    if manifest is not None and leased(folder):
        # A reader looks for the manifest after it wrote its lease: one of the two sees the other.
        (folder / MANIFEST).write(manifest)
        return
    folder.delete_files(is_own_file)


def _foreign(folder: Location) -> list[str]:
    """What lies in a checkpoint's folder that this program did not put there."""
    names = [name for name in folder.sizes() if not is_own_file(name)]
    return [*folder.odd_names(), *names, *(found.name for found in folder.folders())]
