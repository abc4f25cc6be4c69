"""The size table of the generator and discriminator (GAT code; M and H as in CAT's table 1)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Depth in blocks, width in features, attention heads."""

    depth: int
    width: int
    heads: int


SIZES = {
    "S": Size(depth=12, width=384, heads=6),
    "B": Size(depth=12, width=768, heads=12),
    "M": Size(depth=24, width=768, heads=12),
    "L": Size(depth=24, width=1024, heads=16),
    "XL": Size(depth=28, width=1152, heads=16),
    "H": Size(depth=32, width=1280, heads=16),
}


def scales(resolution: int, stages: int) -> tuple[int, ...]:
    """Side of each stage's image as the discriminator sees it, coarse to fine.

    Stage k of K is halved K - k times: 4, 8, 16, 32 for a 32 x 32 latent and four stages.

    Raises:
        ValueError: the resolution can't be halved that often.
    """
    if resolution % 2 ** (stages - 1):
        raise ValueError(f"resolution {resolution} can't be halved {stages - 1} times")
    return tuple(resolution >> (stages - 1 - stage) for stage in range(stages))
