"""A worker's part of a run: its state, its place in the stream, what it does beside training.

Everything named here that saves, draws or evaluates is called by every worker; the first writes.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray
import ray.train
import torch
from torch import distributed

from cat_ray.checkpoint.write import Saved
from cat_ray.config import Config
from cat_ray.data.read import Batch
from cat_ray.data.stream import RankStream
from cat_ray.errors import BadInput, GaveWay, StorageDown, StorageFull
from cat_ray.operations.goodput import Bin, Ledger
from cat_ray.operations.journal import EVENT, Journal
from cat_ray.operations.sample_keys import SampleKeys
from cat_ray.operations.telling import Telling
from cat_ray.operations.trackers import start_trackers
from cat_ray.storage import is_down
from cat_ray.training.agreement import Agreement
from cat_ray.training.cloud_notices import cloud_source
from cat_ray.training.elasticity import RayDrain, drain_node, on_head_node
from cat_ray.training.engines import choose_device
from cat_ray.training.faults import Injector
from cat_ray.training.giving_way import WISHES, Situation, decide, leaving
from cat_ray.training.health import (
    Health,
    Limits,
    RollBack,
    add_roll_back,
    after_step,
    must_roll_back,
    roll_back_message,
)
from cat_ray.training.lanes import micro_batches
from cat_ray.training.micro_batches import micro_batches_of
from cat_ray.training.monitor import Monitor
from cat_ray.training.preemption import Poller
from cat_ray.training.reals import RealsMaker
from cat_ray.training.recorder import Recorder
from cat_ray.training.requests import NOTICES, RESIZE, STOP, StopFile
from cat_ray.training.saver import Saver
from cat_ray.training.state import is_finite, make_state
from cat_ray.training.steps import Figures, MicroBatch
from cat_ray.training.watchdog import Watchdog, end_process

DRAIN_POLL_SECONDS = 0.5


def due(images: int, every_images: int, config: Config) -> bool:
    """Whether an interval ended with the last batch, or the run did."""
    before = images - config.optimisation.batch_size
    return images // every_images > before // every_images or images == config.run.total_images


class Session:
    """From the start of a worker group to its end, as one worker sees it; a context manager."""

    def __init__(self, config: Config, stream: RankStream, name: str, injector: Injector):
        self.config = config
        self.lanes = stream.lanes
        self.images = stream.due.start
        self.noise_stream = stream.due.noise_stream
        self.device = choose_device()
        self._stream = stream
        self._batches = stream.batches()
        self._injector = injector
        self._run = config.storage.locate(config.run.folder)
        self._broken = 0
        self._health = Health()
        self._limits = Limits(**config.health.model_dump(exclude={"max_rollbacks"}))

        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        group = stream.due.worker_group
        optimisation = config.optimisation
        self._parts = micro_batches(
            optimisation.lanes, world_size, rank, optimisation.micro_batch_lanes
        )
        self._telling = Telling()
        self._ledger = Ledger(
            self._run,
            group,
            rank,
            world_size,
            self.images,
            began=stream.due.began,
            session=name,
            tell=self._telling.put,
        )
        checkpoint = stream.due.checkpoint
        storage = config.storage
        self._state = make_state(
            config,
            self.device,
            storage.locate(checkpoint) if checkpoint else None,
        )
        self.adversaries = self._state.adversaries
        self.averages = self._state.averages
        self.reals = RealsMaker(config, stream.due.reading, self.device)
        self._agreement = Agreement()
        self._saver = Saver(
            config, self._run, stream.due, self._state, self._agreement, self._telling.flush
        )
        # Shards and run may lie on different servers: either's outage is no stall.
        places = (self._run, stream.due.reading.folder)
        self._watchdog = Watchdog(
            config.workers.stall_seconds,
            end_process(self._run, rank),
            excused=lambda: any(is_down(place) for place in places),
        )
        self._journal = self._open_journal(name) if rank == 0 else None
        self._monitor = Monitor(
            config,
            stream.due,
            self.averages,
            self.reals,
            self.device,
            self._journal,
            lambda name, picture: self._telling.put(lambda: (self._run / name).write(picture)),
        )
        asked = config.reporting.sample_keys
        self._keys = SampleKeys(self._run, group, rank, self._telling.put) if asked else None
        self.recorder = Recorder(self.device, config.optimisation.batch_size)
        self._around = ExitStack()

    def __enter__(self) -> "Session":
        self._around.enter_context(self._watchdog)
        for source, seconds in self._notice_sources():
            self._around.enter_context(Poller(source, NOTICES, seconds))
        if self._journal is not None:
            self._around.enter_context(StopFile(self._run))
            self._journal.append(EVENT, self.images, message=self._told_start())
        if self.images == 0:
            self.draw_grid()
            self.evaluate()
        self._ledger.started()
        # The first step waits for the first data: that may stall as well.
        self._watchdog.beat()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        outcome = "finished" if kind is None else "yielded" if kind is GaveWay else "failed"
        self._saver.writer.give_up()
        self._ledger.close(self.images, outcome)
        if self._journal is not None:
            self._journal.close()
        # What failed because the storage is down has waited for it long enough.
        down = kind is not None and issubclass(kind, (StorageDown, StorageFull))
        self._telling.close(0.0 if down else self.config.storage.retry_seconds)
        self._around.close()

    def batches(self) -> Iterator[Batch]:
        """This worker's part of every batch still due."""
        return self.recorder.timed(self._batches, self._ledger)

    def micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """A batch and its random numbers, in the parts that go through the networks at once."""
        step = self.images // self.config.optimisation.batch_size
        made = micro_batches_of(
            self.config, batch, self._parts, step, self.reals, self.device, self.noise_stream
        )
        if self._keys is not None:
            noise = torch.cat([each.draws.latents for each in made])
            self._keys.add(self.images, self.lanes, batch.keys, noise.cpu().numpy())
        return made

    def send(self, figures: Figures) -> None:
        """Begins to bring a step's figures to where they are judged, one step late."""
        self._agreement.send(figures)

    def end_step(self) -> None:
        """Agrees with the other workers whether to go on.

        Raises:
            GaveWay: the group is to end here, and has saved what there was time for.
        """
        self._watchdog.beat()
        if self.images == self._stream.due.start + self.config.optimisation.batch_size:
            # The end of a recovery: its duration is read off the ledger.
            self._ledger.note(self.images)
        self._injector.strike(self.images, self._saver.writer)
        wishes = (NOTICES.current() is not None, STOP.is_set(), RESIZE.is_set())
        late, wanted = self._agreement.after_step(wishes)
        self._judge(late)
        for cause, wish in zip(WISHES, wanted, strict=True):
            if wish:
                self._give_way(cause)

    def finish(self) -> None:
        """Waits until the last save is complete, for all workers.

        Raises:
            GaveWay: the last step was bad, which no run may end with: it goes back.
        """
        if not self._is_sound():
            self._roll_back()
        self._complete_saves()

    def record(self) -> None:
        """Writes the figures since the last line.

        Raises:
            BadInput: more samples were broken than the configuration allows.
        """
        values, broken = self.recorder.collect(self._agreement.take_seconds())
        self._broken += len(broken)
        with self.recorder.reporting():
            self._write_down(values, broken)

    def draw_grid(self) -> None:
        """Draws the fixed latents' samples."""
        with self._aside("evaluation"):
            self._monitor.draw_grid(self.images)

    def evaluate(self) -> None:
        """Measures samples."""
        with self._aside("evaluation"):
            self._monitor.evaluate(self.images)

    def save_is_due(self) -> bool:
        """Whether an interval ended since the last save, or the run did.

        Where a step was too bad to be saved, this is so after the next one again.
        """
        every, saved = self.config.checkpoints.save_every_images, self._saver.images
        ended = self.images // every > saved // every
        return ended or self.images == self.config.run.total_images

    def save(self) -> None:
        """Begins to save everything, if this step was good: its figures are waited for.

        Raises:
            GaveWay: the state is beyond repair, and the run goes back.
        """
        if self._saver.images == self.images or not self._is_sound():
            return
        with self._aside("save_stall"):
            self._saver.save(self.images)
        self._ledger.note(self.images)

    def _write_down(self, values: dict[str, float], broken: list[str]) -> None:
        config = self.config
        left = config.run.total_images - self.images
        if self._journal is not None:
            eta = left / values["images_per_second"]
            self._journal.append(
                "train",
                self.images,
                epoch=self.images / self._stream.due.stream.epoch_images,
                workers=distributed.get_world_size(),
                broken_samples=self._broken,
                eta_seconds=eta,
                **values,
            )
            if broken:
                self._journal.append("broken", self.images, samples=broken)
        self._note_saves(self._saver.finished())
        self._ledger.note(self.images)
        if self._broken > config.data.max_broken_samples:
            raise BadInput(
                f"{self._broken} broken samples are more than data.max_broken_samples "
                f"{config.data.max_broken_samples}, the last ones: {'; '.join(broken[-3:])}"
            )

    def _is_sound(self) -> bool:
        """Whether the last step was good and left nothing that is not finite; waits for it."""
        self._judge(self._agreement.settle())
        if self._health.bad:
            return False
        # No figure may tell: at ZeRO 0 a gradient that is not finite shows in the next step's.
        if self._agreement.any(not is_finite(self._state)):
            self._health = Health(1, "weights, averages or moments that are not finite")
            self._roll_back()
        return True

    def _judge(self, steps: list[dict[str, float]]) -> None:
        for figures in steps:
            self._health = after_step(self._health, figures, self._limits)
            if must_roll_back(self._health, self._limits):
                self._roll_back()

    def _roll_back(self) -> None:
        self._note_saves(self._saver.wait())
        self._agreement.barrier()
        to_images = self._saver.images
        told = roll_back_message(self._health, self.images, to_images, self.noise_stream + 1)
        if self._journal is not None:
            reason = self._health.reason or ""
            add_roll_back(self._run, RollBack(self.images, to_images, reason))
            self._journal.append(EVENT, self.images, message=told)
        self._agreement.barrier()
        raise GaveWay("roll-back", told)

    def _give_way(self, cause: str) -> None:
        notice, here = NOTICES.current(), ray.get_runtime_context().get_node_id()
        own = Situation(notice, self._saver.times(), here, on_head_node())
        situations = self._agreement.gather(own)
        margin = self.config.preemption.margin
        # One clock decides for all.
        decision = self._agreement.gather(decide(situations, cause, margin, time.time()))[0]
        kind, told = decision.choice.kind, decision.told
        if kind != "none" and not self._is_sound():
            told += f"; this step can't be saved: {self._health.reason}"
        if self._journal is not None:
            self._journal.append(EVENT, self.images, message=told)
        if notice is not None and decision.cause == "preemption":
            # Whoever told of it, Ray must know: nothing is to start here again.
            drain_node(here, notice.reason, notice.deadline)
        if kind == "storage":
            self.save()
            self._complete_saves()
        if kind == "peer" and self._is_sound():
            with self._aside("save_stall"):
                self._saver.save_for_leaving(self.images, leaving(situations))
        raise GaveWay(decision.cause, told)

    def _complete_saves(self) -> None:
        """Waits until the saves of all workers are complete."""
        with self._aside("save_stall"):
            self._note_saves(self._saver.wait())
            self._agreement.barrier()

    def _note_saves(self, saves: list[Saved]) -> None:
        for saved in saves if self._journal is not None else []:
            self._journal.append(
                "checkpoint",
                saved.images,
                location=saved.location.uri,
                seconds=saved.storage_seconds,
                stall_seconds=saved.stall_seconds,
            )

    def _told_start(self) -> str:
        due, workers = self._stream.due, distributed.get_world_size()
        place = f"the checkpoint at {due.start:,} images" if due.checkpoint else "the beginning"
        if not due.checkpoint and self.config.run.initialise_from:
            place += f", with the weights of {self.config.run.initialise_from}"
        plural = "s" if workers > 1 else ""
        return f"worker group {due.worker_group}, {workers} worker{plural}, starts from {place}"

    def _notice_sources(self) -> Iterator[tuple]:
        yield RayDrain(distributed.get_rank()), DRAIN_POLL_SECONDS
        asked = self.config.preemption
        # Metadata services mind being asked often: one worker of each machine does.
        if asked.cloud is not None and ray.train.get_context().get_local_rank() == 0:
            yield cloud_source(asked.cloud, asked.metadata_url), asked.poll_seconds

    def _open_journal(self, name: str) -> Journal:
        trackers = start_trackers(self.config.reporting.trackers, self._run)
        return Journal(self._run, name, self.images, trackers, tell=self._telling.put)

    @contextmanager
    def _aside(self, bin: Bin) -> Iterator[None]:
        """For what is no step: the watchdog rests, and the rate of images leaves it out."""
        started = time.perf_counter()
        with self._ledger.spending(bin), self._watchdog.resting():
            yield
        self.recorder.pause(time.perf_counter() - started)
