"""The networks of a preparation: pixels to latents, and to DINOv2's tokens where asked for."""

from dataclasses import dataclass

import numpy as np
import torch

from cat_ray.data.latents import load_vae
from cat_ray.data.preparation import Preparation
from cat_ray.evaluation.sampling import to_unit
from cat_ray.objective.alignment import load_teacher


@dataclass(frozen=True)
class Encodings:
    """Of n images: mean and deviation `[n, 8, s, s]`, and tokens `[n, 1 + N, E]` or None; fp16."""

    latents: np.ndarray
    tokens: np.ndarray | None


class Encoder:
    """Holds the networks on a GPU, if there is one."""

    def __init__(self, job: Preparation):
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._codec = load_vae(job.latents.vae or "", job.latents.revision).to(self._device)
        self._grid, self._teacher = job.teacher.grid, None
        if job.output.tokens:
            self._teacher = load_teacher(job.teacher.name, job.teacher.width).to(self._device)

    def encode(self, pixels: np.ndarray) -> Encodings:
        """`[n, S, S, 3]` uint8 to latents and tokens."""
        images = to_unit(torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2))
        mean, std = self._codec.encode(images)
        tokens = None
        if self._teacher is not None:
            tokens = self._teacher(images, self._grid).half().cpu().numpy()
        return Encodings(torch.cat([mean, std], dim=1).half().cpu().numpy(), tokens)
