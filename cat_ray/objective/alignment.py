"""Alignment of the discriminator's tokens with DINOv2's on real images (GAT code, "REPA on D")."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cat_ray.errors import BadInput
from cat_ray.pretrained import kind_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TEACHER_SIDE = 224


def alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine for CLS, plus the same averaged over the patches.

    Args:
        projected: the discriminator's projected tokens, `[B, 1 + N, E]`, CLS first.
        target: the teacher's tokens on the same grid, `[B, 1 + N, E]`, CLS first.

    Returns:
        `[B]`.
    """
    distances = 1.0 - F.cosine_similarity(projected, target, dim=2)
    return distances[:, 0] + distances[:, 1:].mean(dim=1)


class Teacher(nn.Module):
    """A frozen DINOv2 that turns images into target tokens."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])

    @torch.no_grad()
    def forward(self, images: Tensor, grid: int) -> Tensor:
        """`images [B, 1 or 3, S, S]` in [-1, 1] to tokens `[B, 1 + grid * grid, E]`, CLS first."""
        colour = ((images + 1) / 2).expand(-1, 3, -1, -1)
        pixels = F.interpolate(
            (colour - self.mean) / self.std,
            size=(TEACHER_SIDE, TEACHER_SIDE),
            mode="bicubic",
            antialias=True,
        )
        tokens = self.backbone(pixels).last_hidden_state.float()
        cls, patches = tokens[:, :1], tokens[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        if side != grid:
            maps = patches.transpose(1, 2).unflatten(2, (side, side))
            maps = F.interpolate(maps, size=(grid, grid), mode="bicubic")
            patches = maps.flatten(2).transpose(1, 2)
        return torch.cat([cls, patches], dim=1)


def load_teacher(name: str, width: int | None = None) -> Teacher:
    """Loads a DINOv2 by local folder or hub name; of this width, if one is meant.

    Raises:
        BadInput: transformers isn't installed, the model can't be loaded, or has another width.
    """
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise BadInput("DINOv2 needs transformers: pip install '.[alignment]'") from error
    kind = kind_of(name)
    try:
        backbone, loaded = Dinov2Model.from_pretrained(
            name, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise BadInput(f"can't load the teacher from the {kind} {name}: {error}") from error
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise BadInput(f"the teacher {name} is not whole, it lacks {missing} ...")
    if width not in (None, backbone.config.hidden_size):
        raise BadInput(
            f"the teacher {name} has width {backbone.config.hidden_size}, "
            f"objective.alignment.teacher_width says {width}"
        )
    return Teacher(backbone)
