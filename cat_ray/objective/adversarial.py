"""Relativistic pairing, scale by scale (R3GAN; GAT code; CAT per scale).

Each fake is judged against the real image of the same class beside it in the batch. The functions
return one value for each image, `[B]`, averaged over the scales: the caller weights images.
"""

from torch import Tensor
from torch.nn import functional as F


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(-(D(x) - D(h))) over logits `[B, K]`, mean over scales: `[B]`."""
    return F.softplus(fake_logits - real_logits).mean(dim=1)


def generator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(-(D(h) - D(x))) over logits `[B, K]`, mean over scales: `[B]`."""
    return F.softplus(real_logits - fake_logits).mean(dim=1)
