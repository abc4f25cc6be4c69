"""Latents as they lie in a shard: many in one tar member, so that the tar is not what limits.

A pack is a WebDataset sample with the members `latents.npy` `[n, 2c, s, s]` (mean, then standard
deviation of the VAE's posterior, unscaled), `classes.npy` `[n]`, `keys.json`, and, where they were
asked for, `tokens.npy` `[n, 1 + N, E]`, DINOv2's.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cat_ray.data.tar import RawSample
from cat_ray.errors import BadInput

LATENTS, CLASSES, KEYS, TOKENS = "latents.npy", "classes.npy", "keys.json", "tokens.npy"


@dataclass(frozen=True)
class Pack:
    """Some neighbouring samples: latents `[n, 2c, s, s]`, classes `[n]`, keys, tokens or None."""

    latents: np.ndarray
    classes: np.ndarray
    keys: Sequence[str]
    tokens: np.ndarray | None = None

    def members(self) -> dict[str, bytes]:
        """The pack's members in a shard, by ending."""
        held = {
            LATENTS: _to_npy(self.latents),
            CLASSES: _to_npy(self.classes),
            KEYS: json.dumps(list(self.keys)).encode(),
        }
        if self.tokens is not None:
            held[TOKENS] = _to_npy(self.tokens)
        return held


def unpack(sample: RawSample, shard: str) -> Pack:
    """The pack that a shard's sample holds.

    Raises:
        BadInput: it isn't one.
    """
    members = sample.members
    try:
        return Pack(
            latents=_from_npy(members[LATENTS]),
            classes=_from_npy(members[CLASSES]),
            keys=json.loads(members[KEYS]),
            tokens=_from_npy(members[TOKENS]) if TOKENS in members else None,
        )
    except (KeyError, ValueError, EOFError) as error:
        raise BadInput(f"shard {shard}: {sample.key} is no pack of latents: {error}") from error


def _to_npy(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    return content.getvalue()


def _from_npy(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)
