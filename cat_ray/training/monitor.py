"""Looks at the samples while training: grids of fixed latents, and measurements.

Every worker calls every method; the first one writes.
"""

from collections.abc import Callable

import torch
from torch import distributed

from cat_ray.config import Config
from cat_ray.data.read import read_images
from cat_ray.data.stream import Due
from cat_ray.evaluation.classifier import Reference, fit_reference, measure
from cat_ray.evaluation.grid import stage_grid, to_png
from cat_ray.evaluation.sampling import latents, sample_stages, to_pixels, to_unit
from cat_ray.operations.journal import Journal
from cat_ray.training.averaging import Averages
from cat_ray.training.reals import RealsMaker

GRIDS = "grids"
GRID_ROWS = 4
GRID_COLUMNS = 10
REFERENCE_IMAGES = 5000
DECODED_TOGETHER = 16


class Monitor:
    """Samples with the first of the averages; `journal` is the first worker's only.

    `publish` takes a file's path in the run's folder and its bytes.
    """

    def __init__(
        self,
        config: Config,
        due: Due,
        averages: Averages,
        reals: RealsMaker,
        device: torch.device,
        journal: Journal | None,
        publish: Callable[[str, bytes], None],
    ):
        self._config, self._due, self._publish = config, due, publish
        self._averages, self._reals = averages, reals
        self._device, self._journal = device, journal
        self._reference: Reference | None = None

    def draw_grid(self, images: int) -> None:
        """Draws the fixed latents' samples at every stage, side by side."""
        columns = min(self._config.data.num_classes, GRID_COLUMNS)
        count = columns * GRID_ROWS
        outputs = self._sample(range(count), torch.arange(count) % columns)
        if self._journal is not None:
            picture = to_png(stage_grid(self._visible(outputs), columns))
            self._publish(f"{GRIDS}/images-{images:012d}.png", picture)

    def evaluate(self, images: int) -> None:
        """Measures samples against the real images, as the protocol says."""
        evaluation = self._config.evaluation
        if evaluation.protocol == "none":
            return
        world_size, rank = distributed.get_world_size(), distributed.get_rank()
        # Every worker makes equally many: under ZeRO 3 their forward passes go together.
        each = -(-evaluation.samples // world_size)
        own = [(rank * each + place) % evaluation.samples for place in range(each)]
        labels = torch.arange(evaluation.samples) % self._config.data.num_classes
        pixels = to_pixels(self._sample(own, labels[own])[-1]).to(self._device)
        parts = [torch.empty_like(pixels) for _ in range(world_size)]
        distributed.all_gather(parts, pixels)
        if self._journal is not None:
            samples = to_unit(torch.cat(parts)[: evaluation.samples].cpu()).flatten(1).numpy()
            figures = measure(self._fitted_reference(), samples, labels.numpy())
            self._journal.append("evaluation", images, samples=evaluation.samples, **figures)
        distributed.barrier()

    def _sample(self, indices: range | list[int], labels: torch.Tensor) -> torch.Tensor:
        config = self._config
        z = latents(config.run.seed, indices, config.model.generator.latent_width)
        with self._averages.applied(config.optimisation.ema_decays[0]) as network:
            return sample_stages(network, z, labels, self._device)

    def _visible(self, outputs: torch.Tensor) -> torch.Tensor:
        """Stage outputs as pixels in [-1, 1], where there is a VAE for their latents."""
        codec = self._reals.codec
        if codec is None:
            return outputs
        parts = outputs.flatten(0, 1).split(DECODED_TOGETHER)
        pixels = torch.cat([codec.decode(part.to(self._device)).cpu() for part in parts])
        return pixels.unflatten(0, outputs.shape[:2])

    def _fitted_reference(self) -> Reference:
        if self._reference is None:
            due = self._due
            images, labels = read_images(due.reading, due.index, REFERENCE_IMAGES)
            pixels = to_unit(torch.from_numpy(images).permute(0, 3, 1, 2)).flatten(1).numpy()
            self._reference = fit_reference(pixels, labels)
        return self._reference
