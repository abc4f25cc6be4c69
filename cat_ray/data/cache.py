"""A bounded folder on this machine's disk that keeps what was read from a store for next time."""

import contextlib
import hashlib
import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

CHECKSUM_BYTES = 16
ROOM_AFTER_SWEEP = 0.9
SWEEP_EVERY_BYTES = 0.02
# What else lies in the folder is somebody's, and is never deleted.
OWN_NAME = re.compile(r"[0-9a-f]{64}(\.\d+-\d+\.partial)?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """Parts of files by a key, in a folder that several processes share.

    Attributes:
        folder: where; it is made when needed, and holds nothing else.
        max_bytes: how much it may hold, or a few hundredths more for a moment.
    """

    folder: str
    max_bytes: int

    def get(self, key: str) -> bytes | None:
        """What was put under the key, if it is still there, and whole."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            # The order in which parts are given up.
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("the cache %s can't be read: %s", self.folder, error)
            return None
        body, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
        return body if checksum == _checksum(body) else None

    def put(self, key: str, content: bytes) -> None:
        """Keeps a copy; those that were asked for longest ago give way to it."""
        path = self._path(key)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content + _checksum(content))
            partial.replace(path)
        except OSError as error:
            # A disk that is full must not end a run that can read without it.
            logger.warning("nothing more is kept in the cache %s: %s", self.folder, error)
            partial.unlink(missing_ok=True)
            return
        self._count(len(content))

    def _count(self, size: int) -> None:
        """Sweeps now and then: looking at every file is not for every put."""
        _put_since_sweep[self.folder] = _put_since_sweep.get(self.folder, self.max_bytes) + size
        if _put_since_sweep[self.folder] >= SWEEP_EVERY_BYTES * self.max_bytes:
            _put_since_sweep[self.folder] = 0
            self._sweep()

    def _sweep(self) -> None:
        found = []
        for path in Path(self.folder).glob("??/*"):
            if not OWN_NAME.fullmatch(path.name) or not path.name.startswith(path.parent.name):
                continue
            # Another process may have swept it.
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        held = sum(size for _, size, _ in found)
        if held <= self.max_bytes:
            return
        for _, size, path in sorted(found):
            path.unlink(missing_ok=True)
            held -= size
            if held <= ROOM_AFTER_SWEEP * self.max_bytes:
                return

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return Path(self.folder) / name[:2] / name


# Bytes that this process put into a folder since it last swept it.
_put_since_sweep: dict[str, float] = {}


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM_BYTES).digest()
