"""The generator as an ONNX file, and how far it is from PyTorch."""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cat_ray.errors import BadInput, RunFailed
from cat_ray.evaluation.sampling import latents
from cat_ray.model.generator import Generator

ONNX = "generator.onnx"
INPUTS, OUTPUT = ("z", "labels"), "output"
TOLERANCE = 1e-4
# A protobuf message holds less than 2 GiB: weights that come near lie in a file beside it.
LARGEST_BYTES = 2**30
TRACED_BATCH = 3
COMPARED_BATCHES = (1, 4)


class FinalStage(nn.Module):
    """`z [B, latent_width]` and `labels [B]` to the last stage's output, `[B, c, R, R]`."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = generator

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.generator(z, labels)[-1]


def write_onnx(generator: Generator, folder: Path) -> list[Path]:
    """Writes `generator.onnx`, for batches of any size, and for large ones their weights beside it.

    Returns:
        The files, the graph first.

    Raises:
        BadInput: onnx or onnxscript isn't installed.
    """
    if not (find_spec("onnx") and find_spec("onnxscript")):
        raise BadInput("--onnx needs onnx and onnxscript: pip install '.[onnx]'")
    path = folder / ONNX
    weights_bytes = sum(weight.numel() * weight.element_size() for weight in generator.parameters())
    batch = "batch"
    # What it tells of is torch's own affair: torchvision that isn't there, names of dimensions.
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                FinalStage(generator).eval(),
                _inputs(generator, TRACED_BATCH),
                path,
                dynamo=True,
                input_names=INPUTS,
                output_names=[OUTPUT],
                dynamic_shapes={"z": {0: batch}, "labels": {0: batch}},
                external_data=weights_bytes > LARGEST_BYTES,
                verbose=False,
            )
    finally:
        log.setLevel(level)
    return [path, *sorted(set(folder.iterdir()) - {path})]


def differs_by(generator: Generator, path: Path) -> float | None:
    """The largest difference between the file's outputs and PyTorch's, both on the CPU.

    None where there is no onnxruntime.

    Raises:
        RunFailed: it is more than the tolerance.
    """
    if not find_spec("onnxruntime"):
        return None
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    found = 0.0
    for size in COMPARED_BATCHES:
        z, labels = _inputs(generator, size)
        with torch.no_grad():
            expected = generator(z, labels)[-1].numpy()
        (made,) = session.run([OUTPUT], {"z": z.numpy(), "labels": labels.numpy()})
        found = max(found, float(np.abs(made - expected).max()))
    if not found <= TOLERANCE:
        raise RunFailed(
            f"{ONNX} differs from PyTorch by {found:.2g}, more than {TOLERANCE:g}: nothing was "
            "written; export without --onnx"
        )
    return found


def _inputs(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
    """Latents and classes of a batch, on the CPU."""
    shape = generator.shape
    return latents(0, range(size), shape.latent_width), torch.arange(size) % shape.num_classes
