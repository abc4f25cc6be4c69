"""Writes a worker's part of a checkpoint in the background; the first worker commits them all.

The slices are copied while the next step computes its gradients: training stands still only if that
takes less time, just before the weights change. Then a thread writes them to local disk, uploads
them, and leaves a record of the part. Nobody waits for another worker: the manifest is
written by the first worker as soon as all parts are there, or, if that worker is gone by then, by
the driver before it starts the next group.
"""

import hashlib
import logging
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from cat_ray.checkpoint.commit import commit_if_whole
from cat_ray.checkpoint.layout import (
    FOLDER,
    STATE,
    State,
    folder_name,
    part_file,
    slice_file,
)
from cat_ray.checkpoint.read import newest
from cat_ray.checkpoint.records import FileRecord, Part, SliceRecord
from cat_ray.checkpoint.slice_file import write_slice_file
from cat_ray.errors import ExpectedError, StorageDown, StorageFull
from cat_ray.storage import Location
from cat_ray.storage_errors import retry

LOCAL_POLL_SECONDS = 0.02
REMOTE_POLL_SECONDS = 0.5
T = TypeVar("T")

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
        retry_seconds: for how long each write is retried while the storage is down; it replaces the
            patience of `run`.
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
            ExpectedError: an earlier save failed.
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
        """Waits until what is being saved may change: before each optimiser's step.

        Raises:
            ExpectedError: a save failed.
        """
        self._raise_failure()
        if self._copying is not None:
            began = time.perf_counter()
            self._copying.result()
            self._copying = None
            self._stall.seconds += time.perf_counter() - began

    def finished(self) -> list[Saved]:
        """The saves that were finished since the last call.

        Raises:
            ExpectedError: one failed.
        """
        done = [future for future in self._under_way if future.done()]
        self._under_way = [future for future in self._under_way if future not in done]
        return [future.result() for future in done]

    def wait(self) -> list[Saved]:
        """Waits for all saves under way, and returns those that `finished` would.

        Raises:
            ExpectedError: one failed.
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
        try:
            with self._staging(checkpoint) as folder:
                try:
                    part = self._write_slices(folder, slices, copies)
                finally:
                    self._buffers.put(buffer)
                local = time.perf_counter() - began
                self._write_part(checkpoint, folder, part, state)
            if self._rank == 0:
                self._commit(checkpoint)
        except StorageFull as error:
            self._remove_part(checkpoint, slices)
            raise StorageFull(f"{error}{self._remaining()}") from error
        stored = time.perf_counter() - began
        return Saved(state.images, checkpoint, stall.seconds, local, stored)

    @contextmanager
    def _staging(self, checkpoint: Location) -> Iterator[Path]:
        """Where the slices are written: in their place, or on the local disk until uploaded."""
        if checkpoint.local_path is not None:
            yield checkpoint.local_path
            return
        # Its own: workers that share a machine remove what they have uploaded.
        own = self._local / f"cat-ray-{checkpoint.name}-{self._rank:02d}"
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def _write_slices(
        self, folder: Path, slices: Sequence[Slice], copies: Sequence[Tensor]
    ) -> Part:
        files, records = [], []
        for group in dict.fromkeys(piece.group for piece in slices):
            name = slice_file(group, self._rank, self._world_size)
            own = [(s, c) for s, c in zip(slices, copies, strict=True) if s.group == group]
            tensors = {s.tensor: copy for s, copy in own}
            # On a network mount this may have to be tried again, too.
            files.append(self._retry(partial(write_slice_file, folder / name, tensors)))
            records += [
                SliceRecord(group, s.tensor, s.shape, s.offset, len(s.values), name) for s, _ in own
            ]
        return Part(tuple(files), tuple(records))

    def _write_part(self, checkpoint: Location, folder: Path, part: Part, state: State) -> None:
        """Uploads the slices if they lie elsewhere, and then writes what tells of them."""
        if checkpoint.local_path is None:
            for record in part.files:
                self._put(checkpoint / record.name, folder / record.name)
        if self._rank == 0:
            content = state.to_json()
            self._put(checkpoint / STATE, content)
            record = FileRecord(STATE, len(content), hashlib.sha256(content).hexdigest())
            part = Part((*part.files, record), part.slices)
        self._before_record()
        self._put(checkpoint / part_file(self._rank, self._world_size), part.to_json())

    def _remove_part(self, checkpoint: Location, slices: Sequence[Slice]) -> None:
        """Frees the space that a part takes which is not whole."""
        groups = dict.fromkeys(piece.group for piece in slices)
        names = [slice_file(group, self._rank, self._world_size) for group in groups]
        if self._rank == 0:
            names.append(STATE)
        try:
            if (checkpoint / part_file(self._rank, self._world_size)).exists():
                # It is whole: only the manifest is missing, which the next start writes.
                return
            for name in names:
                (checkpoint / name).delete()
        except ExpectedError as error:
            logger.warning("an unfinished checkpoint stays in %s: %s", checkpoint.uri, error)

    def _remaining(self) -> str:
        """What a message adds if the run has a checkpoint to go on from."""
        try:
            return "; the previous checkpoint is whole" if newest(self._run) else ""
        except ExpectedError as error:
            return f"; whether the previous checkpoint is whole can't be told: {error}"

    def _put(self, place: Location, content: bytes | Path) -> None:
        """Writes a file."""
        if isinstance(content, Path):
            self._insist(place, lambda at: at.upload(content))
        else:
            self._insist(place, lambda at: at.write(content))

    def _insist(self, place: Location, act: Callable[[Location], T]) -> T:
        """Does something on storage, again and again for a while where it is down."""

        def once() -> T:
            if self._refused:
                self._refused -= 1
                raise StorageDown(f"storage failed at {place.uri}: refused by a drill")
            return act(place.retried(0))

        return self._retry(once)

    def _retry(self, act: Callable[[], T]) -> T:
        try:
            return retry(act, self._retry_seconds, stopped=self._given_up)
        except StorageDown as error:
            if self._given_up.is_set():
                raise GroupFailed from error
            raise

    def _commit(self, checkpoint: Location) -> None:
        poll = LOCAL_POLL_SECONDS if checkpoint.local_path else REMOTE_POLL_SECONDS
        while not self._insist(checkpoint, commit_if_whole):
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
