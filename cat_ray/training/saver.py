"""Saves a worker's part of the state: in the background, or, at the end, others' parts with it."""

import time
from collections import deque
from collections.abc import Callable

from torch import distributed

from cat_ray.checkpoint.layout import FOLDER, MANIFEST, State, folder_name
from cat_ray.checkpoint.retain import drop_old
from cat_ray.checkpoint.write import CheckpointWriter, Saved
from cat_ray.config import Config, dump
from cat_ray.data.stream import Due
from cat_ray.storage import Location
from cat_ray.training.agreement import Agreement
from cat_ray.training.giving_way import longest
from cat_ray.training.hand_over import hand_over
from cat_ray.training.preemption import SaveTimes, partners
from cat_ray.training.state import TrainingState, state_slices
from cat_ray.versions import versions

COMMIT_POLL_SECONDS = 0.5
RECENT_SAVES = 5


class Saver:
    """One worker's saves, from its worker group's start.

    `flush` waits, at most so many seconds, until what was told of the run is in its folder.

    Attributes:
        images: images seen at the last save that was begun, or that the group started from.
        writer: of this worker's own part.
    """

    def __init__(
        self,
        config: Config,
        run: Location,
        due: Due,
        state: TrainingState,
        agreement: Agreement,
        flush: Callable[[float], object] = lambda seconds: None,
    ):
        self._config, self._run, self._due = config, run, due
        self._state, self._agreement, self._flush = state, agreement, flush
        self._recent: deque[SaveTimes] = deque(maxlen=RECENT_SAVES)
        self.images = due.start
        self.writer = self._writer_for(distributed.get_rank(), due.worker_group)
        state.adversaries.generator.before_step = self.writer.settle
        state.adversaries.discriminator.before_step = self.writer.settle

    def save(self, images: int) -> None:
        """Begins to save everything; the copy is taken while the next step computes gradients."""
        self.writer.save(self._place(images), state_slices(self._state))
        self.images = images

    def finished(self) -> list[Saved]:
        """The saves that were finished since the last call."""
        return self._measured(self.writer.finished())

    def wait(self) -> list[Saved]:
        """Waits for all saves under way, and returns those that `finished` would."""
        return self._measured(self.writer.wait())

    def times(self) -> SaveTimes:
        """How long saves took of late."""
        return longest(self._recent)

    def save_for_leaving(self, images: int, leaving: frozenset[int]) -> None:
        """Saves with the workers that stay uploading the parts of those that leave as well.

        Every worker must call this. It returns when the checkpoint is complete, which a worker
        that leaves need not live to see.
        """
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        slices = state_slices(self._state)
        parts = hand_over(slices, partners(world_size, leaving), self._agreement.group)
        if rank not in leaving:
            parts[rank] = slices
        # A name of its own: a save of this very step by everybody may still be under way.
        group = f"{self._due.worker_group}-staying"
        writers = {owner: self._writer_for(owner, group) for owner in parts}
        for owner, part in parts.items():
            writers[owner].save(self._place(images), part)
        for writer in writers.values():
            writer.wait()
        # Were a worker to end before the others are done, Ray would end them too.
        folder = self._run / FOLDER / folder_name(images, group)
        while not (folder / MANIFEST).exists():
            time.sleep(COMMIT_POLL_SECONDS)
        self.images = images

    def _place(self, images: int) -> State:
        adversaries = self._state.adversaries
        return State(
            images=images,
            noise_stream=self._due.noise_stream,
            data_digest=self._due.index.digest(),
            config=dump(self._config),
            versions=versions(),
            generator_steps=adversaries.generator.steps(),
            discriminator_steps=adversaries.discriminator.steps(),
        )

    def _writer_for(self, rank: int, worker_group: str) -> CheckpointWriter:
        checkpoints, patience = self._config.checkpoints, self._config.upload_retry_seconds()
        return CheckpointWriter(
            self._run,
            worker_group,
            rank,
            distributed.get_world_size(),
            checkpoints.pending_saves,
            patience,
            checkpoints.local_folder,
            # Whoever goes on from a checkpoint finds all that was told until then.
            before_record=lambda: self._flush(patience),
            committed=lambda checkpoint: drop_old(
                self._run, checkpoints.keep, checkpoints.keep_every_images, checkpoint
            ),
        )

    def _measured(self, saves: list[Saved]) -> list[Saved]:
        self._recent.extend(SaveTimes(s.local_seconds, s.storage_seconds) for s in saves)
        return saves
