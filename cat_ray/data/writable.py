"""Whether a folder can be written to, found before the work that would fill it."""

import contextlib
import tempfile

from cat_ray.errors import BadInput
from cat_ray.storage import Location
from cat_ray.storage_errors import explain

PROBE_NAME = ".write-probe"


def check_writable(folder: Location, advice: str) -> None:
    """Writes a little to a folder, or to the nearest one that it lies in, and deletes it again.

    Args:
        folder: it need not be there yet.
        advice: what to do where it can't be written to.

    Raises:
        BadInput: it is read-only, or permission is missing.
        StorageDown: the storage doesn't answer.
    """
    try:
        _probe(folder)
    except BadInput as error:
        raise BadInput(f"{error}: {advice}") from error


def _probe(folder: Location) -> None:
    local = folder.local_path
    if local is None:
        (folder / PROBE_NAME).write(b"")
        # Some may write and not delete; then it stays, with nothing in it.
        with contextlib.suppress(BadInput):
            (folder / PROBE_NAME).delete()
        return
    existing = next(place for place in (local, *local.parents) if place.exists())
    try:
        # It has no name, so that nothing is left even after a kill.
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        raise explain(error, folder.uri, local=True) from error
