"""Writes a whole checkpoint; the manifest, written last, makes it one."""

import errno
import hashlib
from collections.abc import Iterable

import safetensors.torch
from torch import Tensor

from cat_ray.checkpoint.layout import (
    FOLDER,
    MANIFEST,
    STATE,
    FileRecord,
    State,
    folder_name,
    manifest_json,
    read_manifest,
)
from cat_ray.errors import BadInput
from cat_ray.storage import Location


def write_checkpoint(
    run: Location, state: State, files: Iterable[tuple[str, dict[str, Tensor]]]
) -> Location:
    """Writes each file's tensors as they come, the state, and then the manifest.

    Raises:
        BadInput: the storage is full or doesn't answer. No manifest is then written, so that the
            previous checkpoint stays the newest.
    """
    checkpoint = run / FOLDER / folder_name(state.images)
    # What a broken save, or damage, left here must not look whole while it is overwritten.
    (checkpoint / MANIFEST).delete()
    records = []
    for name, tensors in files:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        records.append(_put(checkpoint / name, safetensors.torch.save(contiguous)))
    records.append(_put(checkpoint / STATE, state.to_json()))
    _put(checkpoint / MANIFEST, manifest_json(records))
    return checkpoint


def drop_old(run: Location, keep: int) -> None:
    """Deletes all but the newest complete checkpoints, and nothing newer than those."""
    complete = [folder for folder in (run / FOLDER).folders() if read_manifest(folder) is not None]
    for folder in complete[:-keep]:
        # Without it the rest is no checkpoint, should the deletion break off.
        (folder / MANIFEST).delete()
        folder.delete_folder()


def _put(place: Location, content: bytes) -> FileRecord:
    try:
        place.write(content)
    except BadInput as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            raise BadInput(
                f"no space left for {place.uri} ({len(content):,} bytes): free some and run the "
                "same command again; the previous checkpoint is whole"
            ) from error
        raise
    return FileRecord(place.name, len(content), hashlib.sha256(content).hexdigest())
