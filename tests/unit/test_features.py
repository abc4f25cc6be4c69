"""The features that distances are taken on, beside Inception's, which have a test of their own."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cat_ray.errors import BadInput
from cat_ray.evaluation.features import DINOV2_FILE, Featuriser, grid_means
from cat_ray.objective.alignment import IMAGENET_MEAN, IMAGENET_STD

CPU = torch.device("cpu")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 32, 256])
def test_the_offline_features_are_means_of_squares(channels, side):
    images = torch.randint(0, 256, (60, channels, side, side), dtype=torch.uint8)
    features = Featuriser("pixels").load(CPU)(images)["pooled"]
    assert features.shape == (60, channels * 64)
    square = side // 8
    expected = images[7, -1, -square:, -square:].double().mean() / 255
    assert features[7, -1].item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(features[3:4], grid_means(images[3:4]))


@pytest.fixture(scope="module")
def sha256(tiny_dinov2: Path) -> str:
    return hashlib.sha256((tiny_dinov2 / DINOV2_FILE).read_bytes()).hexdigest()


@pytest.mark.parametrize("channels", [1, 3])
def test_dinov2s_features_are_the_class_token_of_images_as_it_was_trained_on(
    tiny_dinov2, sha256, channels
):
    transformers = pytest.importorskip("transformers")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 32, 32, channels), dtype=np.uint8)
    found = Featuriser("dinov2", str(tiny_dinov2), sha256).load(CPU)(
        torch.from_numpy(images).permute(0, 3, 1, 2)
    )["pooled"]
    assert (found.shape, found.dtype) == ((3, 32), torch.float32)
    # Enlarged by Pillow, as DINOv2's own preprocessing does, in floats: a channel after the other.
    enlarged = np.stack(
        [
            [
                np.asarray(
                    Image.fromarray(image[..., place % channels].astype(np.float32)).resize(
                        (224, 224), Image.Resampling.BICUBIC
                    )
                )
                for place in range(3)
            ]
            for image in images
        ]
    )
    mean, deviation = (np.reshape(values, (3, 1, 1)) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = torch.from_numpy((enlarged / 255 - mean) / deviation).float()
    backbone = transformers.Dinov2Model.from_pretrained(tiny_dinov2).eval()
    with torch.no_grad():
        expected = backbone(pixels).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_another_dinov2_is_refused(tiny_dinov2, tmp_path, sha256):
    with pytest.raises(BadInput, match=r"model\.safetensors has the sha256 .*, not 00"):
        Featuriser("dinov2", str(tiny_dinov2), "00").load(CPU)
    with pytest.raises(BadInput, match=r"can't read the weights .*: No such file"):
        Featuriser("dinov2", str(tmp_path), sha256).load(CPU)
