"""An exported generator: a folder that opens with nothing but torch, numpy and safetensors.

    generator.safetensors     fp32 weights by parameter name
    class_means.safetensors   the mean style of each class, for truncation
    generator.onnx            the same network, where it was asked for
    README.md                 for people, who may change it
    model.json                shape, provenance, sha256 of all files of tensors: written last

A folder without a whole `model.json` is no export.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cat_ray.errors import BadInput
from cat_ray.evaluation.sampling import (
    Truncation,
    check_classes,
    latents,
    sample_stages,
)
from cat_ray.json_text import parse_object
from cat_ray.model.generator import Generator, GeneratorShape
from cat_ray.model.sizes import Size

MODEL = "model.json"
WEIGHTS = "generator.safetensors"
CLASS_MEANS = "class_means.safetensors"
MEANS = "class_means"
FORMAT = 1
# How a network is trained or run, and nothing of what it is.
NOT_EXPORTED = ("activation_checkpointing", "autocast_dtype")


@dataclass(frozen=True)
class Description:
    """What `model.json` says.

    Attributes:
        generator: the network's shape.
        makes: `pictures` in [-1, 1], or `latents` that a VAE decodes.
        vae: its name in training, where the training knew it.
        vae_revision: of the VAE.
        scaling_factor: the VAE's latents were multiplied by it; None for pictures, and where the
            VAE's own configuration has it.
        provenance: where the weights come from.
        sha256: of each file of tensors.
    """

    generator: GeneratorShape
    makes: Literal["pictures", "latents"]
    vae: str | None
    vae_revision: str | None
    scaling_factor: float | None
    provenance: dict[str, Any]
    sha256: dict[str, str]

    def to_json(self) -> bytes:
        """The file's content, with a hash of itself."""
        shape = asdict(self.generator)
        values = {
            "format": FORMAT,
            **vars(self),
            "generator": {name: shape[name] for name in shape if name not in NOT_EXPORTED},
        }
        return json.dumps({**values, "digest": _digest(values)}, indent=1).encode()


def parse_description(content: bytes, name: str) -> Description:
    """Reads `model.json`; `name` is used in messages.

    Raises:
        BadInput: it is damaged, or a newer version wrote it.
    """
    try:
        values = parse_object(content)
        found = values["format"]
        if found == FORMAT and values.pop("digest") == _digest(values):
            shape = values.pop("generator")
            del values["format"]
            shape["size"] = Size(**shape["size"])
            description = Description(generator=GeneratorShape(**shape), **values)
            if isinstance(description.sha256, dict):
                return description
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{name} is damaged: export the checkpoint again") from error
    if found != FORMAT:
        raise BadInput(
            f"{name} has format {found}, this cat-ray reads {FORMAT}: install the one that wrote it"
        )
    raise BadInput(f"{name} is damaged, or was changed: its digest is not that of its content")


@dataclass(frozen=True)
class ExportedGenerator:
    """A generator, ready to sample.

    Attributes:
        network: z `[B, latent_width]` and classes `[B]` to all stage outputs, `[K, B, c, R, R]`.
        class_means: the mean style of each class, `[classes, C]`.
        description: what was exported.
    """

    network: Generator
    class_means: Tensor
    description: Description

    def sample(
        self,
        labels: Sequence[int] | Tensor,
        seed: int = 0,
        truncation: float = 0.0,
        indices: Sequence[int] | None = None,
    ) -> Tensor:
        """A sample of each class in `labels`, `[N, c, R, R]` fp32 on the CPU.

        They are pictures in [-1, 1], or a VAE's latents, scaled. `cat-ray sample --classes 3
        --count 8 --seed 1` shows those of `sample([3] * 8, seed=1)`. In another batch, or on
        another kind of device, sums may be rounded another way.

        Args:
            labels: class ids.
            seed: of the latents.
            truncation: how far styles are drawn to the mean of their class: 0 leaves them, 1 gives
                the mean.
            indices: the number of each sample, which its latent follows from; 0, 1, 2 ... if None.

        Raises:
            BadInput: a class doesn't exist, or the arguments don't go together.
        """
        chosen = torch.as_tensor(labels, dtype=torch.int64).cpu().reshape(-1)
        numbers = range(len(chosen)) if indices is None else indices
        if not len(chosen) or len(numbers) != len(chosen):
            raise BadInput(
                f"{len(chosen)} labels and {len(numbers)} indices: give as many, and at least one"
            )
        if not 0 <= truncation <= 1:
            raise BadInput(f"truncation {truncation} isn't between 0 and 1")
        shape = self.network.shape
        check_classes(chosen.tolist(), shape.num_classes)
        return sample_stages(
            self.network,
            latents(seed, numbers, shape.latent_width),
            chosen,
            self.network.positions.device,
            Truncation(truncation, self.class_means) if truncation else None,
        )[-1]


def load_generator(
    path: str | Path, device: str | torch.device | None = None, endpoint_url: str | None = None
) -> ExportedGenerator:
    """Opens a folder that `cat-ray export` wrote, and checks its files.

    Args:
        path: a local folder; with pyarrow also `s3://bucket/key` and the like.
        device: a GPU if there is one, else the CPU, if None.
        endpoint_url: of a storage that is not the cloud's own.

    Raises:
        BadInput: there is no export, it is damaged, or a newer version wrote it.
    """
    folder = str(path)
    content = _read(folder, MODEL, endpoint_url)
    if content is None:
        raise BadInput(
            f"{folder} is no export, or one that was cut short: it has no {MODEL}. "
            "`cat-ray export CHECKPOINT --out FOLDER` makes one"
        )
    description = parse_description(content, f"{folder}/{MODEL}")
    weights = _tensors(folder, WEIGHTS, description, endpoint_url)
    class_means = _tensors(folder, CLASS_MEANS, description, endpoint_url)
    try:
        network = Generator(description.generator)
        network.load_state_dict(weights)
        means = class_means[MEANS]
    except (RuntimeError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise BadInput(
            f"{folder} is damaged: {MODEL} tells of another network than {WEIGHTS} holds. Export "
            "the checkpoint again"
        ) from error
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return ExportedGenerator(network.eval().requires_grad_(False).to(device), means, description)


def _tensors(
    folder: str, name: str, description: Description, endpoint_url: str | None
) -> dict[str, Tensor]:
    content = _read(folder, name, endpoint_url)
    if content is None:
        raise BadInput(f"{folder}/{name} is missing: export the checkpoint again")
    if hashlib.sha256(content).hexdigest() != description.sha256.get(name):
        raise BadInput(
            f"{folder}/{name} is damaged: its sha256 is not that of {MODEL}, copy it again"
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise BadInput(f"{folder}/{name} is damaged: export the checkpoint again") from error


def _read(folder: str, name: str, endpoint_url: str | None) -> bytes | None:
    """The content of a file of the folder, or None where there is none."""
    if "://" in folder:
        try:
            from cat_ray.storage import locate
        except ImportError as error:
            raise BadInput(f"{folder} is opened with pyarrow: pip install pyarrow") from error
        place = locate(folder, endpoint_url) / name
        return place.read() if place.exists() else None
    try:
        return (Path(folder).expanduser() / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BadInput(f"can't read {folder}/{name}: {error.strerror}") from error


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
