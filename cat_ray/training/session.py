"""A worker's part of a run: its state, its place in the stream, what it does beside training.

Everything named here that saves, draws or evaluates is called by every worker; the first writes.
"""

import time
from collections.abc import Iterator

import torch
from torch import distributed

from cat_ray.checkpoint.layout import State
from cat_ray.checkpoint.write import drop_old, write_checkpoint
from cat_ray.config import Config, dump
from cat_ray.data.read import read_images
from cat_ray.data.stream import Batch, RankStream
from cat_ray.errors import BadInput
from cat_ray.evaluation.classifier import Reference, fit_reference, measure
from cat_ray.evaluation.grid import stage_grid, to_png
from cat_ray.evaluation.sampling import latents, sample_stages, to_pixels, to_unit
from cat_ray.operations.journal import Journal
from cat_ray.operations.trackers import start_trackers
from cat_ray.storage import locate
from cat_ray.training.engines import choose_device
from cat_ray.training.recorder import Recorder
from cat_ray.training.state import make_state, state_files
from cat_ray.versions import versions

GRIDS = "grids"
GRID_ROWS = 4
GRID_COLUMNS = 10
REFERENCE_IMAGES = 5000


def due(images: int, every_images: int, config: Config) -> bool:
    """Whether an interval ended with the last batch, or the run did."""
    before = images - config.optimisation.batch_size
    return images // every_images > before // every_images or images == config.run.total_images


class Session:
    """From the start of a worker group to its end, as one worker sees it."""

    def __init__(self, config: Config, stream: RankStream, name: str):
        self.config = config
        self.lanes = stream.lanes
        self.images = stream.due.start
        self.device = choose_device()
        self._stream = stream
        self._run = locate(config.run.folder, config.storage.endpoint_url, config.storage.region)
        self._broken = 0
        self._reference: Reference | None = None

        checkpoint = stream.due.checkpoint
        storage = config.storage
        self._state = make_state(
            config,
            self.device,
            locate(checkpoint, storage.endpoint_url, storage.region) if checkpoint else None,
        )
        self.adversaries = self._state.adversaries
        self.averages = self._state.averages
        self._first = distributed.get_rank() == 0
        self._journal = self._open_journal(name) if self._first else None
        self.recorder = Recorder(self.device)
        if self.images == 0:
            self.draw_grid()
            self.evaluate()

    def batches(self) -> Iterator[Batch]:
        """This worker's part of every batch still due."""
        return self.recorder.timed(self._stream.batches())

    def record(self) -> None:
        """Writes the figures since the last line.

        Raises:
            BadInput: more samples were broken than the configuration allows.
        """
        config = self.config
        values, broken = self.recorder.collect(config.optimisation.batch_size)
        values["generator_gradient_norm"] = self.adversaries.generator.gradient_norm()
        values["discriminator_gradient_norm"] = self.adversaries.discriminator.gradient_norm()
        self._broken += len(broken)
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
        if self._broken > config.data.max_broken_samples:
            raise BadInput(
                f"{self._broken} broken samples are more than data.max_broken_samples "
                f"{config.data.max_broken_samples}, the last ones: {'; '.join(broken[-3:])}"
            )

    def draw_grid(self) -> None:
        """Draws the fixed latents' samples at every stage, side by side."""
        started = time.perf_counter()
        columns = min(self.config.data.num_classes, GRID_COLUMNS)
        count = columns * GRID_ROWS
        labels = torch.arange(count) % columns
        outputs = self._sample(range(count), labels)
        if self._journal is not None:
            picture = to_png(stage_grid(outputs, columns))
            (self._run / GRIDS / f"images-{self.images:012d}.png").write(picture)
        self._pause(started)

    def evaluate(self) -> None:
        """Measures averaged samples against the real images, as the protocol says."""
        evaluation = self.config.evaluation
        if evaluation.protocol == "none":
            return
        started = time.perf_counter()
        world_size, rank = distributed.get_world_size(), distributed.get_rank()
        # Every worker makes equally many: under ZeRO 3 their forward passes go together.
        each = -(-evaluation.samples // world_size)
        own = [(rank * each + place) % evaluation.samples for place in range(each)]
        labels = torch.arange(evaluation.samples) % self.config.data.num_classes
        pixels = to_pixels(self._sample(own, labels[own])[-1]).to(self.device)
        parts = [torch.empty_like(pixels) for _ in range(world_size)]
        distributed.all_gather(parts, pixels)
        if self._journal is not None:
            samples = to_unit(torch.cat(parts)[: evaluation.samples].cpu()).flatten(1).numpy()
            figures = measure(self._fitted_reference(), samples, labels.numpy())
            self._journal.append("evaluation", self.images, samples=evaluation.samples, **figures)
        distributed.barrier()
        self._pause(started)

    def save(self) -> None:
        """Writes a checkpoint of everything and drops those that are too old."""
        started = time.perf_counter()
        files = state_files(self._state)
        if self._journal is None:
            for _ in files:
                continue
        else:
            state = State(
                images=self.images,
                data_digest=self._stream.due.index.digest(),
                config=dump(self.config),
                versions=versions(),
            )
            checkpoint = write_checkpoint(self._run, state, files)
            drop_old(self._run, self.config.checkpoints.keep)
            seconds = time.perf_counter() - started
            self._journal.append(
                "checkpoint", self.images, location=checkpoint.uri, seconds=seconds
            )
        distributed.barrier()
        self._pause(started)

    def close(self) -> None:
        """Ends the run's files."""
        if self._journal is not None:
            self._journal.close()

    def _open_journal(self, name: str) -> Journal:
        trackers = start_trackers(self.config.reporting.trackers, self._run)
        return Journal(self._run, name, self.images, trackers)

    def _sample(self, indices: range | list[int], labels: torch.Tensor) -> torch.Tensor:
        config = self.config
        z = latents(config.run.seed, indices, config.model.generator.latent_width)
        with self.averages.applied(config.optimisation.ema_decays[0]) as network:
            return sample_stages(network, z, labels, self.device)

    def _fitted_reference(self) -> Reference:
        if self._reference is None:
            due = self._stream.due
            images, labels = read_images(due.folder, due.index, due.num_classes, REFERENCE_IMAGES)
            pixels = to_unit(torch.from_numpy(images)).flatten(1).numpy()
            self._reference = fit_reference(pixels, labels)
        return self._reference

    def _pause(self, started: float) -> None:
        self.recorder.pause(time.perf_counter() - started)
