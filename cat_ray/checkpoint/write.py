"""Writes a worker's part of a checkpoint in the background; the first worker commits them all.

The slices are copied while the next step computes its gradients: training stands still only if that
takes less time, just before the weights change. Then a thread writes them to local disk, uploads
them, and leaves a record of the part. Nobody waits for another worker: the manifest is
written by the first worker as soon as all parts are there, or, if that worker is gone by then, by
the driver before it starts the next group.
"""

import errno
import hashlib
import logging
import os
import queue
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cat_ray.checkpoint.layout import (
    FOLDER,
    MANIFEST,
    STATE,
    FileRecord,
    Part,
    SliceRecord,
    State,
    folder_name,
    join,
    parse_part,
    part_file,
    slice_file,
)
from cat_ray.errors import BadInput
from cat_ray.storage import Location

LOCAL_POLL_SECONDS = 0.02
REMOTE_POLL_SECONDS = 0.5
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
BLOCK_BYTES = 8 << 20
T = TypeVar("T")
PART_NAME = re.compile(r"part-(\d+)-of-(\d+)\.json")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slice:
    """A run of a flattened tensor of a group; `values [length]` may still be in use by training."""

    group: str
    tensor: str
    shape: tuple[int, ...]
    offset: int
    values: Tensor


@dataclass(frozen=True)
class Saved:
    """A save that this worker is done with.

    Attributes:
        images: images seen.
        location: the checkpoint's folder.
        stall_seconds: how long training stood still.
        local_seconds: until this worker's part was on local disk.
        storage_seconds: until it was on the run's storage, and the manifest too where this worker
            commits.
    """

    images: int
    location: Location
    stall_seconds: float
    local_seconds: float
    storage_seconds: float


class CheckpointWriter:
    """Saves one worker's slices, a bounded number of saves at a time.

    Args:
        run: the run's folder.
        worker_group: the worker group's name.
        rank: which worker this is.
        world_size: of how many.
        pending: how many saves may be under way; the next one waits for a free place.
        retry_seconds: for how long a write that the storage refuses is tried again.
        local_folder: where parts wait for their upload; the temporary folder if None.
        before_record: called in the background before each record of this worker's part, without
            which there is no commit.
        committed: called in the background after each commit, by the worker that commits.
    """

    def __init__(
        self,
        run: Location,
        worker_group: str,
        rank: int,
        world_size: int,
        pending: int = 1,
        retry_seconds: float = 600.0,
        local_folder: str | None = None,
        before_record: Callable[[], object] = lambda: None,
        committed: Callable[[Location], None] | None = None,
    ):
        self._run, self._worker_group = run, worker_group
        self._rank, self._world_size = rank, world_size
        self._retry_seconds = retry_seconds
        self._local = Path(local_folder or tempfile.gettempdir())
        self._before_record, self._committed = before_record, committed
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-copy")
        self._copying: Future[tuple[Tensor, list[Tensor]]] | None = None
        self._stall = Stall(0.0)
        self._given_up = threading.Event()
        self._refused = 0
        self._under_way: list[Future[Saved]] = []
        self._buffers: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(pending):
            self._buffers.put(torch.empty(0))

    def save(self, state: State, slices: Sequence[Slice]) -> None:
        """Begins a save, and returns before the slices are copied: they may change after `settle`.

        Raises:
            BadInput: an earlier save failed.
        """
        began = time.perf_counter()
        self._raise_failure()
        buffer = self._buffers.get()
        self._copying = self._copier.submit(_copy, slices, buffer)
        self._stall = Stall(time.perf_counter() - began)
        self._under_way.append(
            self._pool.submit(self._write, state, slices, self._copying, self._stall)
        )

    def settle(self) -> None:
        """Waits until what is being saved may change: before each optimiser's step."""
        if self._copying is not None:
            began = time.perf_counter()
            self._copying.result()
            self._copying = None
            self._stall.seconds += time.perf_counter() - began

    def finished(self) -> list[Saved]:
        """The saves that were finished since the last call.

        Raises:
            BadInput: one failed.
        """
        done = [future for future in self._under_way if future.done()]
        self._under_way = [future for future in self._under_way if future not in done]
        return [future.result() for future in done]

    def wait(self) -> list[Saved]:
        """Waits for all saves under way, and returns those that `finished` would.

        Raises:
            BadInput: one failed.
        """
        saved = [future.result() for future in self._under_way]
        self._under_way = []
        return saved

    def refuse(self, writes: int) -> None:
        """Lets the next writes to storage fail, as storage that can't be reached does."""
        self._refused = writes

    def give_up(self) -> None:
        """Ends the wait for other workers' parts: their group has failed."""
        self._given_up.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._copier.shutdown(wait=False)

    def _raise_failure(self) -> None:
        for future in self._under_way:
            if future.done() and (error := future.exception()) is not None:
                raise error

    def _write(
        self,
        state: State,
        slices: Sequence[Slice],
        copying: "Future[tuple[Tensor, list[Tensor]]]",
        stall: "Stall",
    ) -> Saved:
        began = time.perf_counter()
        buffer, copies = copying.result()
        checkpoint = self._run / FOLDER / folder_name(state.images, self._worker_group)
        # Its own: workers that share a machine remove what they have uploaded.
        own = self._local / f"cat-ray-{checkpoint.name}-{self._rank:02d}"
        staging = checkpoint.local_path or own
        try:
            part = self._write_slices(staging, slices, copies)
        finally:
            self._buffers.put(buffer)
        local = time.perf_counter() - began
        if staging != checkpoint.local_path:
            for record in part.files:
                self._put(checkpoint / record.name, staging / record.name)
            shutil.rmtree(staging, ignore_errors=True)
        if self._rank == 0:
            content = state.to_json()
            self._put(checkpoint / STATE, content)
            record = FileRecord(STATE, len(content), hashlib.sha256(content).hexdigest())
            part = Part((*part.files, record), part.slices)
        self._before_record()
        self._put(checkpoint / part_file(self._rank, self._world_size), part.to_json())
        if self._rank == 0:
            self._commit(checkpoint)
        stored = time.perf_counter() - began
        return Saved(state.images, checkpoint, stall.seconds, local, stored)

    def _write_slices(
        self, folder: Path, slices: Sequence[Slice], copies: Sequence[Tensor]
    ) -> Part:
        files, records = [], []
        for group in dict.fromkeys(piece.group for piece in slices):
            name = slice_file(group, self._rank, self._world_size)
            own = [(s, c) for s, c in zip(slices, copies, strict=True) if s.group == group]
            partial = folder / f".{name}.partial"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                partial.touch()
                mode = partial.stat().st_mode
                safetensors.torch.save_file({s.tensor: copy for s, copy in own}, partial)
                # safetensors makes a file that only its owner may read.
                partial.chmod(mode)
                files.append(_made_durable(partial, name))
                partial.replace(folder / name)
            except (OSError, SafetensorError) as error:
                raise _explained(folder / name, error) from error
            records += [
                SliceRecord(group, s.tensor, s.shape, s.offset, len(s.values), name) for s, _ in own
            ]
        return Part(tuple(files), tuple(records))

    def _put(self, place: Location, content: bytes | Path) -> None:
        """Writes a file."""
        if isinstance(content, Path):
            self._insist(place, lambda: place.upload(content))
        else:
            self._insist(place, lambda: place.write(content))

    def _insist(self, place: Location, act: Callable[[], T]) -> T:
        """Does something on storage, again and again for a while where it fails."""
        give_up_at, pause = time.monotonic() + self._retry_seconds, FIRST_PAUSE_SECONDS
        while True:
            try:
                if self._refused:
                    self._refused -= 1
                    raise BadInput(f"storage failed at {place.uri}: refused by a drill")
                return act()
            except BadInput as error:
                cause = error.__cause__
                if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
                    raise _explained(place.uri, cause) from error
                if time.monotonic() > give_up_at:
                    raise
                logger.warning("%s; trying again in %g s", error, pause)
            if self._given_up.wait(pause):
                raise GroupFailed
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _commit(self, checkpoint: Location) -> None:
        poll = LOCAL_POLL_SECONDS if checkpoint.local_path else REMOTE_POLL_SECONDS
        while not self._insist(checkpoint / MANIFEST, lambda: commit_if_whole(checkpoint)):
            if self._given_up.wait(poll):
                raise GroupFailed
        if self._committed is not None:
            self._committed(checkpoint)


@dataclass
class Stall:
    """How long training stood still for one save, so far."""

    seconds: float


class GroupFailed(Exception):
    """The worker group has failed: this worker's part of a save is of no use to anyone."""


def commit_if_whole(checkpoint: Location) -> bool:
    """Writes the manifest if the parts of all workers are there; whether it is there now.

    Whoever does it, and however often, writes the same.
    """
    sizes = checkpoint.sizes()
    if MANIFEST in sizes:
        return True
    named = [match for name in sizes if (match := PART_NAME.fullmatch(name))]
    if not named or len(named) < int(named[0][2]) or STATE not in sizes:
        return False
    parts = [parse_part((checkpoint / match[0]).read()) for match in named]
    if None in parts:
        return False
    (checkpoint / MANIFEST).write(join(part for part in parts if part).to_json())
    return True


@torch.no_grad()
def _copy(slices: Sequence[Slice], buffer: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The slices' values in a buffer of the CPU's, as its views; the same buffer if it fits."""
    lengths = [len(piece.values) for piece in slices]
    if len(buffer) != sum(lengths):
        # Pinned, so that a GPU copies at the bus's rate.
        buffer = torch.empty(sum(lengths), pin_memory=torch.cuda.is_available())
    copies = list(buffer.split(lengths))
    torch._foreach_copy_(copies, [piece.values for piece in slices])
    return buffer, copies


def _made_durable(path: Path, name: str) -> FileRecord:
    digest = hashlib.sha256()
    with path.open("r+b") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
        os.fsync(file.fileno())
    return FileRecord(name, path.stat().st_size, digest.hexdigest())


def _explained(place: object, error: Exception) -> BadInput:
    full = "No space left" in str(error)
    remedy = "free some and run the same command again; the previous checkpoint is whole"
    return BadInput(
        f"no space left for {place}: {remedy}" if full else f"can't write {place}: {error}"
    )
