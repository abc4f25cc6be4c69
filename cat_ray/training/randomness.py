"""Every random draw as a function of (seed, purpose, position): never of rank, size or past."""

import hashlib
from enum import StrEnum

import numpy as np


class Purpose(StrEnum):
    """What a stream of random numbers is for; the names are part of a run's identity."""

    INITIALISATION = "initialisation"
    LATENT = "latent"
    DISCRIMINATOR_AUGMENT_REAL = "discriminator-augment-real"
    DISCRIMINATOR_AUGMENT_FAKE = "discriminator-augment-fake"
    GENERATOR_AUGMENT_REAL = "generator-augment-real"
    GENERATOR_AUGMENT_FAKE = "generator-augment-fake"
    POSTERIOR = "posterior"
    PENALTY_REAL = "penalty-real"
    PENALTY_FAKE = "penalty-fake"
    # Named when a shard was one block: the name is part of every run's order.
    BLOCK_ORDER = "shard-order"
    SAMPLE_ORDER = "sample-order"
    SAMPLE_LATENT = "sample-latent"
    SAMPLE_LABEL = "sample-label"
    CLASS_MEAN_LATENT = "class-mean-latent"
    PREPARATION = "preparation"


def key(seed: int, purpose: Purpose, *position: int) -> int:
    """A 128-bit key of the stream at this position, the same on every machine."""
    text = ":".join([str(seed), purpose.value, *map(str, position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


def random_stream(seed: int, purpose: Purpose, *position: int) -> np.random.Generator:
    """The random numbers at this position, from their first.

    Philox takes the whole key (PyTorch's CPU generator keeps 32 bits of a seed, in which streams
    soon collide). Numbers are drawn on the CPU and then moved: they are the same on every device.
    """
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *position)))
