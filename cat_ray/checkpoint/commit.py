"""Commits a checkpoint: joins the parts of all workers in its manifest."""

import logging

from cat_ray.checkpoint.layout import (
    MANIFEST,
    PART_FORM,
    STATE,
    checkpoint_folders,
    parse_manifest,
    parsed,
    part_file,
)
from cat_ray.checkpoint.records import join, parse_part
from cat_ray.errors import Damaged
from cat_ray.storage import Location

logger = logging.getLogger(__name__)


def commit_if_whole(checkpoint: Location) -> bool:
    """Writes the manifest if the parts of all workers are there; whether it is there now.

    Whoever does it, and however often, writes the same.

    Raises:
        Damaged: the parts are not as they were written, or aren't those of one checkpoint.
    """
    sizes = checkpoint.sizes()
    if MANIFEST in sizes:
        return True
    counts = {int(match[1]) for name in sizes if (match := PART_FORM.fullmatch(name))}
    if not counts or max(counts) > len(sizes):
        return False
    names = [part_file(rank, max(counts)) for rank in range(max(counts))]
    if not sizes.keys() >= {*names, STATE}:
        return False
    parts = [parsed(checkpoint / name, parse_part) for name in names]
    try:
        content = join(parts).to_json()
        # Nothing is committed that readers would refuse.
        parse_manifest(content)
    except ValueError as error:
        raise Damaged(f"{checkpoint.uri} can't be completed: {error}") from error
    (checkpoint / MANIFEST).write(content)
    return True


def commit_abandoned(run: Location) -> None:
    """Commits the checkpoints whose parts are all there, but whose first worker was killed."""
    for folder in checkpoint_folders(run):
        try:
            commit_if_whole(folder)
        except Damaged as error:
            logger.warning("%s; it is not used", error)
