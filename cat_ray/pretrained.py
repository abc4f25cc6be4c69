"""Models of others, by local folder or by their name on the hub."""

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
