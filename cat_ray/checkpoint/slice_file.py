"""A file with one worker's slices of a group of tensors, written to a local disk."""

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cat_ray.checkpoint.records import FileRecord
from cat_ray.storage_errors import explain

BLOCK_BYTES = 8 << 20


def write_slice_file(path: Path, tensors: dict[str, Tensor]) -> FileRecord:
    """Writes flat tensors to a new file, which is in place once it is whole and on the disk.

    Raises:
        StorageFull: there is no space left. Nothing of the file stays.
        StorageDown: a network mount is away.
        BadInput: the file can't be written for another reason.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        safetensors.torch.save_file(tensors, partial)
        # safetensors makes a file that only its owner may read.
        partial.chmod(mode)
        record = _made_durable(partial, path.name)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        # Half a file would only take space.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise explain(_system_error(error), str(path), local=True) from error
    return record


def _made_durable(path: Path, name: str) -> FileRecord:
    digest = hashlib.sha256()
    with path.open("r+b") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
        os.fsync(file.fileno())
    return FileRecord(name, path.stat().st_size, digest.hexdigest())


def _system_error(error: OSError | SafetensorError) -> OSError:
    """The system's error of which safetensors has only kept the text."""
    if isinstance(error, OSError):
        return error
    told = str(error)
    number = next((n for n in errno.errorcode if os.strerror(n) in told), errno.EINVAL)
    return OSError(number, told)
