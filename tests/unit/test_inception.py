"""Inception, against torch-fidelity's port of the same graph with the same random weights."""

import hashlib
import importlib
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cat_ray.errors import BadInput
from cat_ray.evaluation.distance import frechet_distance
from cat_ray.evaluation.inception import Inception, load_inception, resize
from cat_ray.evaluation.inception_score import ClassSums, inception_score
from cat_ray.evaluation.moments import FeatureSums
from cat_ray.evaluation.precision_recall import Balls

PEER = "torch-fidelity==0.4.0"
IMAGES, WIDTH = 5000, 96
SIDE = 32
SAME = 1e-6


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.SimpleNamespace]:
    """Modules of torch-fidelity, which isn't installed: it needs a torchvision that fits no torch
    for CPUs from PyPI, and with one that doesn't fit transformers can't be imported."""
    folder = tmp_path_factory.mktemp("peer")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PEER]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    package = types.ModuleType("torch_fidelity")
    package.__path__ = [str(folder / "torch_fidelity")]
    # What the metrics' formulas take from there reads images and asks caches.
    outside = types.ModuleType("torch_fidelity.utils")
    outside.__getattr__ = lambda name: None  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules |= {"torch_fidelity": package, "torch_fidelity.utils": outside}
    names = ("feature_extractor_inceptionv3", "metric_fid", "metric_isc", "metric_prc")
    yield types.SimpleNamespace(
        **{name: importlib.import_module(f"torch_fidelity.{name}") for name in names}
    )
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that keep features of different images apart, as safetensors and as .pth."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    folder = tmp_path_factory.mktemp("weights")
    safetensors.torch.save_file(network.state_dict(), folder / "inception.safetensors")
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.safetensors"


@pytest.fixture(scope="module")
def network(weights: Path) -> Inception:
    return load_inception(str(weights), hashlib.sha256(weights.read_bytes()).hexdigest())


def pictures(count: int, side: int = SIDE, seed: int = 0) -> Tensor:
    """Smooth coloured pictures: noise at a few places, enlarged."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=random)
    return (nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1) * 255).byte()


def extractor(peer: types.SimpleNamespace, weights: Path, dtype: str) -> nn.Module:
    return peer.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "peer",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(weights.with_suffix(".pth")),
        feature_extractor_internal_dtype=dtype,
    )


@pytest.mark.parametrize("side", [8, 32, 64, 256, 299, 400])
def test_features_are_the_peers_at_any_size(peer, network, weights, side):
    images = pictures(3, side, seed=side)
    found = network(images)
    pooled, logits = extractor(peer, weights, "float32")(images)
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-5)
    assert found.spatial.shape == (3, 2023)


def test_the_spatial_features_are_the_first_channels_of_mixed_6_conv(peer, network, weights):
    images, seen = pictures(2), []
    other = extractor(peer, weights, "float32")
    # mixed is 5b, mixed_3 is 6a, so mixed_6 is 6d; its conv is the first branch.
    other.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.append(call[2]))
    other(images)
    expected = seen[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, -1)
    np.testing.assert_allclose(network(images).spatial.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_resizing_is_tensorflow_1s():
    row = torch.tensor([0.0, 3.0, 6.0]).expand(1, 1, 3, 3)
    # Places 0, 0.5, 1, ... and none beyond the last pixel.
    expected = torch.tensor([0.0, 1.5, 3.0, 4.5, 6.0, 6.0])
    torch.testing.assert_close(resize(row, 6)[0, 0], expected.expand(6, 6))


def test_all_metrics_are_the_peers_on_the_features_of_5000_images(peer):
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=random) / WIDTH**0.5
    # As Inception's: never negative, correlated, many of them small.
    real, samples = torch.randn(2, IMAGES, WIDTH, generator=random).matmul(mix).relu().unbind()
    samples = samples * 1.1 + 0.05
    logits = 3 * torch.randn(IMAGES, 100, generator=random)
    own = Features(real, samples, logits)
    check_metrics(peer, own, own)


@pytest.mark.long
def test_all_metrics_are_the_peers_on_5000_images(peer, network, weights):
    images = {"real": pictures(IMAGES), "samples": (pictures(IMAGES, seed=1) * 0.8).byte()}
    other = extractor(peer, weights, "float32")
    found: dict[str, dict[str, Tensor]] = {"own": {}, "theirs": {}}
    for name, whole in images.items():
        own = [network(part) for part in whole.split(50)]
        theirs = [other(part) for part in whole.split(50)]
        found["own"] |= {
            name: torch.cat([part.pooled for part in own]),
            "logits": torch.cat([part.logits for part in own]),
        }
        found["theirs"] |= {
            name: torch.cat([part[0] for part in theirs]),
            "logits": torch.cat([part[1] for part in theirs]),
        }
    check_metrics(peer, Features(**found["own"]), Features(**found["theirs"]))


@dataclass
class Features:
    """Pooled features `[N, d]` of two sets, and logits of the samples, `[N, classes]`."""

    real: Tensor
    samples: Tensor
    logits: Tensor


def check_metrics(peer: types.SimpleNamespace, own: Features, theirs: Features) -> None:
    """Of our features by our formulas, and of theirs by theirs."""
    merged: list[FeatureSums] = []
    for values in (own.real.numpy(), own.samples.numpy()):
        parts = [FeatureSums.of(part) for part in np.split(values, 10)]
        merged.append(reduce(FeatureSums.merged, parts))
        found, exact = merged[-1].moments(), values.astype(np.float64)
        np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=SAME)
        np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), atol=SAME)

    moments = [
        peer.metric_fid.fid_features_to_statistics(features.double())
        for features in (theirs.samples, theirs.real)
    ]
    expected = peer.metric_fid.fid_statistics_to_metric(*moments, verbose=False)
    distance = frechet_distance(*(sums.moments() for sums in merged))
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=SAME)

    score = inception_score([ClassSums.of(part) for part in np.split(own.logits.numpy(), 10)])
    expected = peer.metric_isc.isc_features_to_metric(theirs.logits, splits=10, shuffle=False)
    assert score == pytest.approx(expected["inception_score_mean"], rel=SAME)

    expected = peer.metric_prc.prc_features_to_metric(
        theirs.samples.double(),
        theirs.real.double(),
        prc_neighborhood=3,
        prc_batch_size=1000,
        save_cpu_ram=True,
        verbose=False,
    )
    real, samples = own.real.double(), own.samples.double()
    precision = Balls.round(real).share_inside(samples)
    recall = Balls.round(samples).share_inside(real)
    assert precision == pytest.approx(expected["precision"], abs=SAME)
    assert recall == pytest.approx(expected["recall"], abs=SAME)
    assert 0 < precision < 1 and 0 < recall < 1, "the features tell nothing"


# What is no file of weights.


@pytest.mark.parametrize("sha256", ["", "6726825d", "0" * 64])
def test_weights_with_another_hash_are_refused(weights, sha256):
    with pytest.raises(BadInput, match=f"has the sha256 [0-9a-f]{{64}}, not {sha256}: "):
        load_inception(str(weights), sha256)


def test_a_file_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match=r"can't read the weights .*absent: No such file"):
        load_inception(str(tmp_path / "absent"), "")


@pytest.mark.parametrize("other", ["pickled", "of another network"])
def test_other_weights_are_refused_though_their_hash_is_right(weights, tmp_path, other):
    path = weights.with_suffix(".pth")
    if other != "pickled":
        path = tmp_path / "other.safetensors"
        safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(BadInput, match="holds no weights of Inception: "):
        load_inception(str(path), hashlib.sha256(path.read_bytes()).hexdigest())
