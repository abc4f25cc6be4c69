"""Models of others, by local folder or by their name on the hub."""

import hashlib
from pathlib import Path

from cat_ray.errors import BadInput


def kind_of(name: str) -> str:
    """What a model's name is, for messages.

    Raises:
        BadInput: it can only be a folder, and there is none.
    """
    if Path(name).exists():
        return "folder"
    if name.startswith((".", "/", "~")):
        raise BadInput(f"there is no folder {name} to load a model from")
    return "hub name or folder"


def read_weights(path: str, sha256: str) -> bytes:
    """A local file of weights, of which `sha256` is the hash, in full.

    Raises:
        BadInput: there is no such file, or it has another hash.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise BadInput(
            f"can't read the weights {path}: {error.strerror}; the README says where they come from"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256.lower():
        raise BadInput(f"{path} has the sha256 {found}, not {sha256}: it is another file")
    return content
