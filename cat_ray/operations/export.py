"""`cat-ray export`: a checkpoint's generator as one folder that opens without Ray or DeepSpeed."""

import hashlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import cat_ray
from cat_ray.checkpoint.layout import MANIFEST, State
from cat_ray.checkpoint.read import load_generator, read_state, resolve
from cat_ray.checkpoint.retain import lease
from cat_ray.config import Config, parse
from cat_ray.data.index import read_index
from cat_ray.errors import BadInput, ExpectedError
from cat_ray.evaluation.sampling import class_means
from cat_ray.exported import CLASS_MEANS, MEANS, MODEL, WEIGHTS, Description
from cat_ray.model.generator import Generator
from cat_ray.operations.model_card import README, model_card
from cat_ray.operations.onnx_graph import differs_by, write_onnx
from cat_ray.storage import Location

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        description: what `model.json` says.
        onnx_differs_by: the largest difference between ONNX and PyTorch; None where there is no
            ONNX file, or no onnxruntime to run it.
    """

    description: Description
    onnx_differs_by: float | None


def export(
    checkpoint: Location, out: Location, decay: float | None = None, onnx: bool = False
) -> Exported:
    """Writes the folder, `model.json` last.

    Args:
        checkpoint: a checkpoint, or a run for its newest.
        out: a new or empty folder.
        decay: which average of the weights: the first if None, 0 for the raw ones.
        onnx: whether to write the network as ONNX too.

    Raises:
        BadInput: checkpoint, folder or decay can't be used, or ONNX's packages are missing.
        RunFailed: the ONNX file computes something else.
    """
    place = resolve(checkpoint)
    if not out.is_empty():
        raise BadInput(f"{out.uri} isn't empty: choose another --out")
    with lease(place):
        state = read_state(place)
        config = parse(state.config, place.uri)
        chosen = config.optimisation.ema_decays[0] if decay is None else decay
        generator = load_generator(place, chosen)
        manifest_sha256 = hashlib.sha256((place / MANIFEST).read()).hexdigest()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    means = class_means(generator.to(device), device)
    generator.to("cpu")
    with tempfile.TemporaryDirectory() as folder:
        # First, for what can go wrong in it.
        graph = write_onnx(generator, Path(folder)) if onnx else []
        difference = differs_by(generator, graph[0]) if onnx else None
        sha256 = {}
        for name, tensors in ((WEIGHTS, generator.state_dict()), (CLASS_MEANS, {MEANS: means})):
            content = safetensors.torch.save(dict(tensors), metadata={"format": "pt"})
            (out / name).write(content)
            sha256[name] = hashlib.sha256(content).hexdigest()
        for path in graph:
            (out / path.name).upload(path)
            with path.open("rb") as file:
                sha256[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = _provenance(place.name, manifest_sha256, state, config) | {"decay": chosen}
    description = _described(generator, state, config, provenance, sha256)
    (out / README).write(model_card(description, difference).encode())
    (out / MODEL).write(description.to_json())
    return Exported(description, difference)


def _provenance(
    checkpoint: str, manifest_sha256: str, state: State, config: Config
) -> dict[str, Any]:
    # No paths or URIs: the folder may be published.
    return {
        "checkpoint": checkpoint,
        "manifest_sha256": manifest_sha256,
        "images_seen": state.images,
        "seed": config.run.seed,
        "config_sha256": hashlib.sha256(state.config.encode()).hexdigest(),
        "data_sha256": state.data_digest,
        "trained_with": state.versions,
        "exported_with": {"cat-ray": cat_ray.__version__, "torch": torch.__version__},
    }


def _described(
    generator: Generator,
    state: State,
    config: Config,
    provenance: Mapping[str, Any],
    sha256: dict[str, str],
) -> Description:
    return Description(
        generator=generator.shape,
        makes="latents" if config.makes_latents() else "pictures",
        vae=config.latents.vae,
        vae_revision=config.latents.revision,
        scaling_factor=_scaling_factor(state, config) if config.makes_latents() else None,
        provenance=dict(provenance),
        sha256=sha256,
    )


def _scaling_factor(state: State, config: Config) -> float | None:
    """What the run's shards say that their latents were multiplied by.

    None where the shards hold images, can't be read from here, or are other ones by now.
    """
    storage = config.storage
    try:
        index = read_index(storage.locate(config.data.shards))
    except ExpectedError as error:
        logger.warning("the scaling factor of the latents is not recorded: %s", error)
        return None
    if index.contents != "latents" or index.digest() != state.data_digest:
        return None
    return index.made_with.get("scaling_factor", 1.0)
