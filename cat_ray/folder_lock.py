"""One command at a time in a folder: a renewed lease, which outlives its holder only for a while.

Each command that wants a folder writes a file of its own there, so that no two ever write the same
one: conditional writes aren't needed, which not every S3 server has. Who holds the folder says so
in its file. A holder that is killed leaves its file behind; who comes next sees that nobody renews
it, or, on the same machine, that its process is gone.

Two that come at the same moment: first each says that it wants the folder, then it looks. Who sees
a holder gives up. Who sees another that wants it, with a lesser name, waits for what that one does.
After it has said that it holds the folder it looks once more in the same way. A write is seen by
every later look, so of two holders at least one sees the other, and the greater name gives way.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cat_ray.errors import BadInput, ExpectedError, NotFound, StorageDown
from cat_ray.storage import Location

PREFIX, SUFFIX = ".lock-", ".json"
LEASE_SECONDS = 30.0
RENEW_SECONDS = 8.0
POLL_SECONDS = 1.0
# Clocks of two machines may differ by so much: an older lease is nobody's.
CLOCK_SECONDS = 600.0
EXIT_TAKEN_OVER = 75

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """What a command says of itself in its file.

    Attributes:
        name: of the file; the lesser of two goes first.
        command: what it does, as `cat-ray train`.
        host: of the machine, for people.
        machine: tells machines, and process namespaces on one, apart.
        process: its id there.
        started: when the process began, in the machine's own ticks.
        holds: whether it holds the folder; else it wants it.
        renewed: how often it was renewed.
        time: of the last renewal, unix time.
    """

    name: str
    command: str
    host: str
    machine: str
    process: int
    started: int
    holds: bool
    renewed: int
    time: float

    def __str__(self) -> str:
        return f"`{self.command}` on {self.host}, process {self.process}"


_CLAIM = TypeAdapter(Claim)


@contextmanager
def locked(folder: Location, command: str) -> Iterator[None]:
    """Holds a folder for as long as the block lasts.

    Waits where the holder may be dead, but no longer than its lease.

    Raises:
        BadInput: another command holds the folder.
    """
    own = _Own(folder, _claim(command))
    own.write()
    try:
        _wait_for_others(own)
        own.write(holds=True)
        _wait_for_others(own)
        thread = threading.Thread(target=own.keep_renewed, name="folder-lock", daemon=True)
        thread.start()
        yield
    finally:
        own.give_back()


def is_lock(name: str) -> bool:
    """Whether a file of this name is a lock's, and not the folder's content."""
    return PREFIX in name


def is_gone(claim: Claim) -> bool:
    """Whether the command is known to have ended: its process is gone, or its lease is very old.

    A process of this machine that is there may have been stopped for long, and goes on.
    """
    if claim.machine == _machine():
        return _started(claim.process) != claim.started
    return claim.time < time.time() - LEASE_SECONDS - CLOCK_SECONDS


class _Own:
    """This command's claim, and its file."""

    def __init__(self, folder: Location, claim: Claim):
        self.folder, self.claim = folder, claim
        self._place = folder / claim.name
        self._left = threading.Event()
        self._written = 0.0

    def write(self, holds: bool | None = None) -> None:
        """Writes the file anew, renewed."""
        now = self.claim.holds if holds is None else holds
        self.claim = replace(
            self.claim, holds=now, renewed=self.claim.renewed + 1, time=time.time()
        )
        self._place.write(json.dumps(asdict(self.claim)).encode())
        self._written = time.monotonic()

    def renew_if_due(self) -> None:
        """Shows others that this command still waits."""
        if time.monotonic() - self._written > RENEW_SECONDS:
            self.write()

    def keep_renewed(self) -> None:
        """Renews the lease until it is given back."""
        self._place = self._place.retried(0)
        while not self._left.wait(RENEW_SECONDS):
            try:
                if not self._place.exists() and not self._left.is_set():
                    _end(self.folder)
                self.write()
            except StorageDown as error:
                # Who wants the folder can't see it either.
                logger.debug("%s", error)
            except ExpectedError as error:
                logger.warning("the lock of %s can't be renewed: %s", self.folder.uri, error)

    def give_back(self) -> None:
        """Removes the file."""
        self._left.set()
        try:
            self._place.retried(0).delete()
        except ExpectedError as error:
            logger.warning("%s; the next command waits until this lock has run out", error)


@dataclass(frozen=True)
class _Seen:
    """What was first seen of another's claim, and since when it has not been renewed."""

    held: bool
    claim: Claim
    since: float


def _wait_for_others(own: _Own) -> None:
    """Returns once nobody else has the folder, or will have it before this command.

    Raises:
        BadInput: another command holds it.
    """
    seen: dict[str, _Seen] = {}
    while True:
        now = time.monotonic()
        others = _others(own)
        waits = False
        for other in others:
            if is_gone(other) or not _goes_first(other, own.claim):
                continue
            is_here = other.machine == own.claim.machine
            if other.name not in seen:
                seen[other.name] = _Seen(other.holds, other, now)
                if other.holds and not is_here:
                    _say_waiting(own.folder, other)
            before = seen[other.name]
            renewed = other.renewed != before.claim.renewed
            # Of a process here it is known that it lives.
            if other.holds and (is_here or renewed or not before.held):
                raise BadInput(
                    f"{own.folder.uri} is in use by {other}: wait until it has ended, stop it, or "
                    "choose another folder"
                )
            if renewed:
                seen[other.name] = replace(before, claim=other, since=now)
            waits = waits or now - seen[other.name].since <= LEASE_SECONDS
        if not waits:
            for other in others:
                if is_gone(other) or other.name in seen:
                    (own.folder / other.name).delete()
            return
        time.sleep(POLL_SECONDS)
        own.renew_if_due()


def _goes_first(other: Claim, own: Claim) -> bool:
    """Whether this command must wait for what another does."""
    if other.name < own.name:
        return True
    return other.holds and not own.holds


def _say_waiting(folder: Location, other: Claim) -> None:
    logger.warning(
        "%s was last used by %s: looking for up to %.0f s whether it still runs",
        folder.uri,
        other,
        LEASE_SECONDS,
    )


def _others(own: _Own) -> list[Claim]:
    """What others say; a file that can't be read is of a holder that may live."""
    found = []
    for name in own.folder.sizes():
        if name == own.claim.name or not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
            continue
        try:
            content = (own.folder / name).read()
        except NotFound:
            continue
        try:
            claim = replace(_CLAIM.validate_json(content), name=name)
        except ValidationError:
            claim = replace(
                _claim("an unknown command"), name=name, holds=True, machine="", process=0
            )
        found.append(claim)
    return found


def _end(folder: Location) -> None:
    """Ends this process at once: a command that did not see it alive has taken the folder."""
    print(
        f"cat-ray: {folder.uri} was taken over by another command, while this one could not renew "
        "its lock: stopping at once",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_TAKEN_OVER)


def _claim(command: str) -> Claim:
    process = os.getpid()
    return Claim(
        name=f"{PREFIX}{uuid.uuid4().hex[:12]}{SUFFIX}",
        command=command,
        host=socket.gethostname(),
        machine=_machine(),
        process=process,
        started=_started(process) or 0,
        holds=False,
        renewed=0,
        time=time.time(),
    )


@cache
def _machine() -> str:
    """Processes with the same one can see each other by their ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return uuid.uuid4().hex


def _started(process: int) -> int | None:
    """When a process of this machine began, in ticks since the machine did; None if it is gone."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, *fields = status.rpartition(")")[2].split()
    # A zombie waits only for its parent to notice.
    return None if state in ("Z", "X") else int(fields[18])
