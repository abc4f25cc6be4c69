"""Latents as they lie in a shard: many in one tar member, so that the tar is not what limits.

A pack is a WebDataset sample with the members `latents.npy` `[n, 2c, s, s]` (mean, then standard
deviation of the VAE's posterior, unscaled), `classes.npy` `[n]`, `keys.json`, and, where they were
asked for, `tokens.npy` `[n, 1 + N, E]`, DINOv2's.
"""

import io
import json
import math
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy

from cat_ray.data.tar import RawSample
from cat_ray.errors import BadInput
from cat_ray.json_text import parse_json

LATENTS, CLASSES, KEYS, TOKENS = "latents.npy", "classes.npy", "keys.json", "tokens.npy"
# What numpy and json raise for damaged content; numpy reads a header as Python text.
UNREADABLE = (
    KeyError,
    ValueError,
    TypeError,
    EOFError,
    RecursionError,
    SyntaxError,
    tokenize.TokenError,
)


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
        pack = Pack(
            latents=_from_npy(members[LATENTS]),
            classes=_from_npy(members[CLASSES]),
            keys=parse_json(members[KEYS]),
            tokens=_from_npy(members[TOKENS]) if TOKENS in members else None,
        )
        _check(pack)
    except UNREADABLE as error:
        raise BadInput(f"shard {shard}: {sample.key} is no pack of latents: {error}") from error
    return pack


def _check(pack: Pack) -> None:
    keys, count = pack.keys, pack.classes.shape
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{KEYS} holds no list of names")
    if pack.classes.dtype.kind not in "iu" or count != (len(keys),):
        raise ValueError(f"{CLASSES} holds {count} {pack.classes.dtype}, not {len(keys)} integers")
    for name, array, axes in ((LATENTS, pack.latents, 4), (TOKENS, pack.tokens, 3)):
        if array is None:
            continue
        if array.dtype.kind != "f" or array.ndim != axes or array.shape[:1] != count:
            raise ValueError(f"{name} is {array.dtype} of the shape {array.shape}, not {count[0]}")


def _to_npy(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    return content.getvalue()


def _from_npy(content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    version = npy.read_magic(file)
    read: Any = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    # The shape is to fit before memory is taken for it.
    if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"an array of the shape {shape} is not {len(content):,} bytes long")
    return npy.read_array(io.BytesIO(content), allow_pickle=False)
