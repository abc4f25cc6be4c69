"""What a Ray Data task does for the stream: pieces of blocks to samples.

Without torch, whose import would take longer than the rest of the start of a process.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cat_ray.data.read import Batch, Part, Reading, read_parts

CPUS_PER_READ = 0.5
COLUMNS = ("content", "labels", "keys", "broken")
PIECES = "pieces"


def packed(pieces: Sequence[Mapping[str, Any]]) -> bytes:
    """What a task is to read: of each piece its `Part`, and the rows of its samples as `slots`.

    In Arrow's stream format: Ray would take longer to turn so many small arrays into a table.
    """
    table, sink = pa.Table.from_pylist(list(pieces)), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def read_pieces(rows: Mapping[str, np.ndarray], reading: Reading) -> dict[str, np.ndarray]:
    """The columns of `Batch`, and `slot`, each sample's row in the window."""
    (content,) = rows[PIECES]
    pieces = pa.ipc.open_stream(content).read_all().to_pylist()
    slots = np.concatenate([np.asarray(piece.pop("slots")) for piece in pieces])
    parts = [Part(**{**piece, "members": tuple(piece["members"])}) for piece in pieces]
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
