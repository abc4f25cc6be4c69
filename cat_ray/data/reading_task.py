"""What a Ray Data task does for the stream: pieces of blocks to samples.

Without torch, whose import would take longer than the rest of the start of a process.
"""

import numpy as np
import pyarrow as pa

from cat_ray.data.read import Batch, Part, Reading, read_parts

COLUMNS = ("content", "labels", "keys", "broken")


def read_pieces(pieces: pa.Table, reading: Reading) -> dict[str, np.ndarray]:
    """The columns of `Batch`, and `slot`, each sample's row in the window.

    A row of `pieces` is a `Part`, with the rows of its samples as `slots`.
    """
    slots = np.concatenate([each.values.to_numpy() for each in pieces["slots"]])
    parts = [
        Part(**{**row, "members": tuple(row["members"])})
        for row in pieces.drop_columns("slots").to_pylist()
    ]
    batch = read_parts(reading, parts, _room(reading, len(slots)))
    return {**{name: getattr(batch, name) for name in COLUMNS}, "slot": slots}


_rooms: dict[Reading, Batch] = {}


def _room(reading: Reading, size: int) -> Batch:
    """Memory that this process's last task used, whose results Ray has copied since."""
    room = _rooms.get(reading)
    if room is None or len(room.labels) < size:
        _rooms.clear()
        room = _rooms[reading] = Batch.empty(reading, size)
    return room.rows(0, size)
