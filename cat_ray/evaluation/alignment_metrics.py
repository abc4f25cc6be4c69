"""CAT's three measures of how well the stages agree (latent space; project page)."""

from torch import Tensor
from torch.nn import functional as F


def discrepancy(outputs: Tensor) -> Tensor:
    """Mean square distance of each early stage to the final output.

    `outputs [K, B, c, R, R]` to `[K - 1, B]`.
    """
    return (outputs[:-1] - outputs[-1:]).square().flatten(2).mean(dim=2)


def rewrite(outputs: Tensor) -> Tensor:
    """Mean square of what each stage changes: h_k to h_{k+1}, `[K - 1, B]`."""
    return (outputs[1:] - outputs[:-1]).square().flatten(2).mean(dim=2)


def direction(outputs: Tensor) -> Tensor:
    """Cosine between each stage's change and the way that remains to the final output.

    `[K - 2, B]`: the last change points there by construction and is left out.
    """
    changes = (outputs[1:-1] - outputs[:-2]).flatten(2)
    remaining = (outputs[-1:] - outputs[:-2]).flatten(2)
    return F.cosine_similarity(changes, remaining, dim=2)


def alignment_figures(outputs: Tensor) -> dict[str, Tensor]:
    """All three by name and stage, one value for each image, `[B]`."""
    figures: dict[str, Tensor] = {}
    for stage, values in enumerate(discrepancy(outputs), start=1):
        figures[f"discrepancy_{stage}"] = values
    for stage, values in enumerate(rewrite(outputs), start=1):
        figures[f"rewrite_{stage}"] = values
    for stage, values in enumerate(direction(outputs), start=1):
        figures[f"direction_{stage}"] = values
    return figures
