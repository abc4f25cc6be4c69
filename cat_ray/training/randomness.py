"""Every random draw as a function of (seed, purpose, position): never of rank, size or past."""

import hashlib
from enum import StrEnum

import torch


class Purpose(StrEnum):
    """What a stream of random numbers is for; the names are part of a run's identity."""

    INITIALISATION = "initialisation"
    LATENT = "latent"
    DISCRIMINATOR_AUGMENT_REAL = "discriminator-augment-real"
    DISCRIMINATOR_AUGMENT_FAKE = "discriminator-augment-fake"
    GENERATOR_AUGMENT_REAL = "generator-augment-real"
    GENERATOR_AUGMENT_FAKE = "generator-augment-fake"
    PENALTY_REAL = "penalty-real"
    PENALTY_FAKE = "penalty-fake"
    SHARD_ORDER = "shard-order"
    SAMPLE_ORDER = "sample-order"
    SAMPLE_LATENT = "sample-latent"
    EVALUATION = "evaluation"
    PREPARATION = "preparation"


def key(seed: int, purpose: Purpose, *position: int) -> int:
    """A 63-bit key of the stream at this position, the same on every machine."""
    text = ":".join([str(seed), purpose.value, *map(str, position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(seed: int, purpose: Purpose, *position: int) -> torch.Generator:
    """A fresh CPU generator for the stream at this position.

    Draws are made on the CPU and then moved, so that they are the same on every device.
    """
    return torch.Generator().manual_seed(key(seed, purpose, *position))
