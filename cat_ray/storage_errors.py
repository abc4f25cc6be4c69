"""What a storage's failures mean, and the one policy by which they are retried."""

import errno
import logging
import math
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from cat_ray.errors import BadInput, ExpectedError, NotFound, StorageDown, StorageFull

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0
REMIND_SECONDS = 60.0
REMOTE_HINT = "; check the URI, storage.endpoint_url and the credentials in the environment"
REGION_HINT = "; the bucket lies in another region: set storage.region (or AWS_REGION) to its own"
FULL_HINT = ": free some space and run the same command again"

# Request timeout, conflict of two requests, too many requests: the same request may succeed later.
PASSING_STATUS = frozenset({408, 409, 425, 429})
MOVED_STATUS = frozenset({301, 307, 308})
FULL_STATUS = 507
# What a server says, in Arrow's words, that may pass, whatever its status.
PASSING = ("REQUEST_TIMEOUT", "RequestTimeout", "SLOW_DOWN", "THROTTLING")
# And what a retry cannot fix.
FINAL = (
    "NO_SUCH_",
    "ACCESS_DENIED",
    "ACCESS_KEY",
    "SIGNATURE",
    "TOKEN",
    "CREDENTIALS",
    "[ContainerNotFound]",
    "[Authentication",
    "[Authorization",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "INVALID_ARGUMENT",
)
# Steps of an upload in parts that only the whole of it, done anew, mends: of an answer that was cut
# off Arrow keeps no name of the part, and asks for the end of an upload that has ended already.
UPLOAD_STEPS = ("during UploadPart ", "during CompleteMultipartUpload ")
UPLOAD_LOST = ("NO_SUCH_UPLOAD", "InvalidPart", "NoSuchUpload")
# A network mount that is away answers with these; a disk of this machine rarely does.
PASSING_LOCALLY = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EAGAIN,
        errno.EREMOTEIO,
    }
)
FULL_LOCALLY = frozenset({errno.ENOSPC, errno.EDQUOT})
FILES_HINT = "; too many files are open: raise the limit, as with `ulimit -n 65536`"

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


def explain(error: OSError, uri: str, local: bool) -> ExpectedError:
    """The exception of ours that says what a failed operation on a file means.

    Args:
        error: what Arrow or the operating system raised.
        uri: of the file.
        local: whether it lies in a file system of this machine.
    """
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, FileNotFoundError) or "NO_SUCH_KEY" in reason:
        return NotFound(f"{uri} doesn't exist")
    told = f"storage failed at {uri}: {reason}"
    if local:
        number = _errno(error)
        if number in FULL_LOCALLY:
            return StorageFull(f"no space left for {uri}{FULL_HINT}")
        if number in (errno.EMFILE, errno.ENFILE):
            return BadInput(f"{told}{FILES_HINT}")
        if number in (errno.ENOTDIR, errno.EEXIST):
            return BadInput(f"{uri}: what should be a folder is a file: name another place")
        return (StorageDown if number in PASSING_LOCALLY else BadInput)(told)
    status = _http_status(reason)
    if status == FULL_STATUS or "StorageFull" in reason:
        return StorageFull(f"no space left for {uri}{FULL_HINT}")
    if status in MOVED_STATUS:
        return BadInput(f"{told}{REGION_HINT}")
    lost = any(step in reason for step in UPLOAD_STEPS) and any(m in reason for m in UPLOAD_LOST)
    if lost or status in PASSING_STATUS or any(mark in reason for mark in PASSING):
        return StorageDown(f"{told}{REMOTE_HINT}")
    final = any(mark in reason for mark in FINAL) or (status is not None and 400 <= status < 500)
    return (BadInput if final else StorageDown)(f"{told}{REMOTE_HINT}")


def no_space_left(error: OSError) -> StorageFull | None:
    """What an error says to the user if it is that a disk of this machine is full."""
    if _errno(error) not in FULL_LOCALLY:
        return None
    place = error.filename or "temporary files (TMPDIR)"
    return StorageFull(f"no space left for {place}{FULL_HINT}")


def retry(
    ask: Callable[[], Answer], seconds: float, stopped: threading.Event | None = None
) -> Answer:
    """Calls `ask` until the storage answers, with growing pauses, for so many seconds.

    Args:
        ask: reads or writes; it must be safe to call again.
        seconds: for how long; 0 asks once.
        stopped: once set, the next failure is raised at once.

    Raises:
        StorageDown: the storage is still down after that time.
        ExpectedError: it answered, with something that a retry cannot fix.
    """
    began = time.monotonic()
    pause, remind_at = FIRST_PAUSE_SECONDS, began
    while True:
        try:
            answer = ask()
        except StorageDown as error:
            now = time.monotonic()
            if now + pause > began + seconds or (stopped is not None and stopped.is_set()):
                raise
            if now >= remind_at:
                left = began + seconds - now
                limit = "" if math.isinf(left) else f" for another {left:.0f} s"
                logger.warning("%s; retrying%s", error, limit)
                remind_at = now + REMIND_SECONDS
        else:
            if remind_at > began:
                logger.warning("the storage answers again, after %.0f s", time.monotonic() - began)
            return answer
        # Many readers must not all come back at once.
        shortened = pause * random.uniform(0.5, 1.0)
        if stopped is None:
            time.sleep(shortened)
        else:
            stopped.wait(shortened)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _http_status(reason: str) -> int | None:
    found = re.search(r"(?:HTTP )?status:? (?:code )?(\d{3})\b", reason, re.IGNORECASE)
    return int(found[1]) if found else None


def _errno(error: OSError) -> int | None:
    if error.errno is not None:
        return error.errno
    found = re.search(r"\[errno (\d+)\]", str(error), re.IGNORECASE)
    return int(found[1]) if found else None
