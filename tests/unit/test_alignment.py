"""Alignment with DINOv2: the loss by a slow formula, the teacher with a tiny random backbone."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cat_ray.errors import BadInput
from cat_ray.objective.alignment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Teacher,
    alignment_loss,
    load_teacher,
)

transformers = pytest.importorskip("transformers")

WIDTH, GRID = 32, 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def folder(tiny_dinov2: Path) -> Path:
    return tiny_dinov2


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return load_teacher(str(folder), WIDTH)


# The loss.


def test_the_loss_is_the_cosine_distance_of_cls_and_the_mean_of_the_patches():
    projected, target = random(3, 5, 4, seed=1), random(3, 5, 4, seed=2)

    def distance(image: int, token: int) -> float:
        a, b = projected[image, token].tolist(), target[image, token].tolist()
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        return 1 - dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))

    expected = [
        distance(image, 0) + sum(distance(image, token) for token in range(1, 5)) / 4
        for image in range(3)
    ]
    found = alignment_loss(projected, target)
    assert found.shape == (3,)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("factor", "expected"), [(1, 0), (7, 0), (-1, 4), (-0.1, 4)])
def test_only_the_direction_of_a_token_counts(factor, expected):
    target = random(2, 5, 4)
    torch.testing.assert_close(
        alignment_loss(factor * target, target), torch.full((2,), float(expected))
    )


# The teacher.


@pytest.mark.parametrize("grid", [8, 16, 32])
@pytest.mark.parametrize(("channels", "side"), [(1, 32), (3, 64)])
def test_tokens_come_on_the_grid_that_is_asked_for(teacher, grid, channels, side):
    assert teacher(random(2, channels, side, side), grid).shape == (2, 1 + grid**2, WIDTH)


def test_on_its_own_grid_the_tokens_are_the_backbones(teacher, folder):
    backbone = transformers.Dinov2Model.from_pretrained(folder).eval()
    images = random(2, 3, 224, 224)
    unit = (images + 1) / 2
    pixels = torch.stack(
        [(unit[:, c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)], dim=1
    )
    with torch.no_grad():
        expected = backbone(pixels).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(teacher(images, GRID), expected, rtol=1e-3, atol=1e-3)


def test_a_grey_image_is_seen_as_a_colour_image_without_colour(teacher):
    grey = random(2, 1, 32, 32)
    assert torch.equal(teacher(grey, GRID), teacher(grey.repeat(1, 3, 1, 1), GRID))


def test_another_grid_leaves_cls_alone_and_keeps_the_mean_of_the_patches(teacher):
    images = random(2, 3, 32, 32)
    own, coarse = teacher(images, GRID), teacher(images, GRID // 2)
    assert torch.equal(own[:, 0], coarse[:, 0])
    gap = own[:, 1:].mean(dim=1) - coarse[:, 1:].mean(dim=1)
    assert gap.abs().max() < 0.5 * own[:, 1:].std()


def test_a_resized_grid_has_its_rows_and_columns_in_place():
    class Ramp(nn.Module):
        """Each patch's token is its own row and column."""

        def forward(self, pixels: Tensor) -> SimpleNamespace:
            rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
            patches = torch.stack([rows.flatten(), columns.flatten()], dim=1)
            tokens = torch.cat([torch.full((1, 2), -1.0), patches])
            return SimpleNamespace(last_hidden_state=tokens.expand(len(pixels), -1, -1))

    tokens = Teacher(Ramp())(random(1, 3, 32, 32), 8)[0]
    assert tokens[0].tolist() == [-1, -1]
    rows, columns = tokens[1:].T.view(2, 8, 8)
    # The centres of 8 patches lie between those of 16; the border is clamped.
    torch.testing.assert_close(rows[1:-1], (2 * torch.arange(1.0, 7) + 0.5)[:, None].expand(-1, 8))
    torch.testing.assert_close(columns, rows.T)


def test_the_teacher_is_frozen(teacher):
    images = random(1, 3, 32, 32).requires_grad_()
    assert not teacher(images, GRID).requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.backbone.training


# Loading.


def test_another_width_than_configured_is_refused_with_both(folder):
    with pytest.raises(BadInput) as caught:
        load_teacher(str(folder), 768)
    for words in (str(folder), "width 32", "objective.alignment.teacher_width says 768"):
        assert words in str(caught.value)


def test_a_path_that_does_not_exist_is_refused_by_name(tmp_path):
    with pytest.raises(BadInput, match=f"there is no folder {tmp_path}/absent"):
        load_teacher(f"{tmp_path}/absent", WIDTH)


def test_a_folder_without_weights_is_refused_as_a_folder(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(BadInput, match=f"can't load the teacher from the folder {tmp_path}: "):
        load_teacher(str(tmp_path), WIDTH)


def test_weights_that_are_not_all_there_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    halved = {name: value for name, value in weights.items() if "layer.1." not in name}
    assert 0 < len(halved) < len(weights)
    safetensors.torch.save_file(halved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=str(tmp_path)):
        load_teacher(str(tmp_path), WIDTH)
