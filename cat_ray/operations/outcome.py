"""`outcome.json`: how the last call that trained a run ended, for scripts and schedulers.

Ray's own job command turns every failure into exit code 1; this file keeps the difference. Who
can't reach the run's folder reads in the log which checkpoint a run stopped with.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

from cat_ray.checkpoint.layout import images_of
from cat_ray.errors import ExpectedError, StorageDown, StorageFull
from cat_ray.storage import Location

OUTCOME = "outcome.json"
EXIT_CODES = {"finished": 0, "failed": 1, "bad input": 2, "unfinished": 75}

End = Literal["finished", "failed", "bad input", "unfinished"]
END_OF: dict[int, End] = {1: "failed", 2: "bad input", 75: "unfinished"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        outcome: `unfinished` means that the same command goes on from a good checkpoint.
        images: images seen at the newest complete checkpoint.
        message: what was said to the user, empty if all went well.
        exit_code: the command's.
        time: unix time.
    """

    outcome: End
    images: int
    message: str
    exit_code: int
    time: float


def forget_outcome(run: Location) -> None:
    """Removes what an earlier call wrote: there is none while one trains, or if it is killed."""
    (run / OUTCOME).delete()


def write_outcome(run: Location, outcome: End, images: int, message: str = "") -> None:
    """Writes the file anew."""
    ended = Outcome(outcome, images, message, EXIT_CODES[outcome], time.time())
    (run / OUTCOME).write(json.dumps(asdict(ended), indent=1).encode())


@contextmanager
def outcome_written(run: Location, images: Callable[[], int]) -> Iterator[None]:
    """Writes how the block ended; `images` tells how many the newest checkpoint has seen."""
    forget_outcome(run)
    try:
        yield
    except ExpectedError as error:
        # A storage that is down has been waited for by then.
        down = isinstance(error, (StorageDown, StorageFull))
        place = run.retried(0) if down else run
        try:
            write_outcome(place, END_OF[error.exit_code], images(), str(error))
        except ExpectedError as failure:
            logger.warning("%s is not written: %s", OUTCOME, failure)
        raise
    write_outcome(run, "finished", images())


def stopped_with(checkpoint: Location | None) -> str:
    """How the message of a call that stopped before its end begins."""
    if checkpoint is None:
        return "stopped before the first checkpoint"
    return f"stopped with {images_of(checkpoint.name):,} images in the checkpoint {checkpoint.uri}"


def checkpoint_told(log: str) -> str | None:
    """The checkpoint of the last `stopped_with` in a log, or None."""
    found = re.findall(r"stopped with [\d,]+ images in the checkpoint (.+?) \(", log)
    return found[-1] if found else None
