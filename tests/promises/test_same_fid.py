"""`cat-ray fid` on a real Ray: any number of workers, killed or not, gives the same bits."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cat_ray.config import parse
from cat_ray.connection import connected
from cat_ray.data.index import read_index
from cat_ray.data.read import Reading, read_images
from cat_ray.evaluation.distance import frechet_distance, moments
from cat_ray.evaluation.features import grid_means
from cat_ray.evaluation.measurement import Workers
from cat_ray.evaluation.precision_recall import Balls
from cat_ray.evaluation.precision_recall_tasks import precision_and_recall
from cat_ray.evaluation.sampling import class_labels, latents, sample_stages, to_pixels
from cat_ray.model.build import build_generator
from cat_ray.storage import Location, locate

COMMAND = str(Path(sys.executable).with_name("cat-ray"))
SAMPLES = 2500
WAIT_SECONDS = 300


@pytest.fixture
def job(tmp_path: Path, checkpoint: Location, digit_shards: Path) -> Path:
    """A measurement of random weights against digits."""
    values = {
        "samples": {"checkpoint": checkpoint.uri, "count": SAMPLES},
        "features": {"network": "pixels"},
        "reference": str(digit_shards),
        "output": {"folder": f"{tmp_path}/undisturbed"},
    }
    path = tmp_path / "fid.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def fid(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, "fid", *map(str, arguments)], capture_output=True, text=True)


def result(folder: Path) -> tuple[Path, dict[str, Any]]:
    (place,) = folder.glob("*.json")
    return place, json.loads(place.read_text())


def by_hand(tmp_path: Path, tiny_job: str) -> tuple[np.ndarray, float]:
    """Samples and distance without any of the job: all at once, in one process."""
    config, device = parse(tiny_job, "job.yaml"), torch.device("cpu")
    torch.manual_seed(1)
    generator = build_generator(config).eval()
    z = latents(0, range(SAMPLES), generator.shape.latent_width)
    labels = class_labels("uniform", 0, range(SAMPLES), 10)
    samples = to_pixels(sample_stages(generator, z, labels, device)[-1])
    folder = locate(f"{tmp_path}/shards")
    reading = Reading(folder, "images", 32, 1, crop=False, num_classes=10)
    pixels, _ = read_images(reading, read_index(folder), 5000)
    reals = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    sets = [moments(grid_means(images).numpy()) for images in (samples, reals)]
    return samples.numpy(), frechet_distance(*sets)


def check_sigterm(job: Path, changes: list[str]) -> None:
    """Once it works it ends with a word, and an exit code that tells that it can go on."""
    stopped = subprocess.Popen(
        [COMMAND, "fid", job, *changes, "--set", "samples.count=50000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert stopped.stdout is not None
    line = stopped.stdout.readline()
    assert "ranges of samples" in line, line
    stopped.send_signal(signal.SIGTERM)
    told = stopped.communicate(timeout=WAIT_SECONDS)[1].splitlines()
    # Ray's own lines may come before it or after it.
    ours = [line for line in told if line.startswith("cat-ray: ")]
    assert ours == ["cat-ray: stopped by SIGTERM: run the same command again to go on"], told
    assert not any("***" in line for line in told), told
    assert stopped.returncode == 75


def check_copies(stem: Path, samples: np.ndarray) -> None:
    """The contact sheet, the PNG files and the shards beside a result, `[N, 1, H, W]`."""
    sheet = np.asarray(Image.open(stem.with_suffix(".png")))
    assert np.array_equal(sheet[32:64, 96:128], samples[13, 0])
    files = sorted(Path(f"{stem}-png").iterdir())
    assert len(files) == SAMPLES
    assert np.array_equal(np.asarray(Image.open(files[2042])), samples[2042, 0])
    folder = locate(f"{stem}-shards")
    reading = Reading(folder, "images", 32, 1, crop=False, num_classes=10)
    pixels, labels = read_images(reading, read_index(folder), SAMPLES)
    assert np.array_equal(pixels[..., 0], samples[:, 0])
    assert np.array_equal(labels, class_labels("uniform", 0, range(SAMPLES), 10))


def test_workers_and_kills_change_no_bit(job: Path, tmp_path: Path, tiny_job: str) -> None:
    alone = fid(job)
    assert alone.returncode == 0, alone.stderr[-3000:]
    place, undisturbed = result(tmp_path / "undisturbed")
    assert undisturbed["metric"] == "pixels2500_shards" in alone.stdout
    # Batches of another size may round a sample's pixel the other way.
    samples, distance = by_hand(tmp_path, tiny_job)
    assert undisturbed["figures"]["frechet"] == pytest.approx(distance, rel=1e-3)

    folder = tmp_path / "disturbed"
    output = f"output={{folder: {folder}, npz: true, png: true, shards: true}}"
    changes = ["--set", output]
    driver = subprocess.Popen(
        [COMMAND, "fid", job, *changes, "--set", "workers.count=2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + WAIT_SECONDS
    # Five are of the digits.
    while len(features := list(folder.glob("features-*/*[0-9].safetensors"))) < 6:
        assert driver.poll() is None and time.monotonic() < until, "it was over before the kill"
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not list(folder.glob("*.json"))
    check_sigterm(job, changes)
    written = {path: path.stat().st_mtime_ns for path in features}
    again = fid(job, *changes, "--set", "workers.count=3")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "1 of 3 ranges of samples" not in again.stdout, "one was there already"
    digits_made = {path: at for path, at in written.items() if path.exists()}
    assert len(digits_made) == 5, "the samples' ranges stay after the result"
    assert {path: path.stat().st_mtime_ns for path in digits_made} == digits_made

    other, disturbed = result(folder)
    assert disturbed["pixels_sha256"] == undisturbed["pixels_sha256"]
    assert disturbed["figures"] == undisturbed["figures"]
    assert np.isfinite(list(disturbed["figures"].values())).all()
    with np.load(other.with_suffix(".npz")) as npz:
        images = npz["arr_0"]
        assert (images.dtype, images.shape) == (np.uint8, (SAMPLES, 32, 32, 3))
        assert np.array_equal(npz["arr_1"], class_labels("uniform", 0, range(SAMPLES), 10))
    # The digits are grey: three equal channels.
    grey = np.ascontiguousarray(images[:, None, :, :, 0])
    assert (grey != samples).mean() < 1e-4
    assert (grey[1000:] != samples[:-1000]).mean() > 1e-2, "the samples are too much alike"
    starts = range(0, SAMPLES, 1000)
    hashes = [hashlib.sha256(grey[begin : begin + 1000]).hexdigest() for begin in starts]
    assert hashlib.sha256("".join(hashes).encode()).hexdigest() == disturbed["pixels_sha256"]
    finished = fid(job, *changes)
    assert finished.returncode == 0 and other.name in finished.stdout.replace("\n", "")
    assert "ranges of" not in finished.stdout, "it was made again"
    check_copies(other.with_suffix(""), grey)
    compared = fid("--compare", place, other)
    assert (compared.returncode, compared.stdout.splitlines()[-1]) == (0, "comparable")

    changed = json.loads(other.read_text())
    changed["protocol"] |= {"labels": "balanced", "samples": 5000}
    other.write_text(json.dumps(changed))
    refused = fid("--compare", place, other)
    assert refused.returncode == 1
    assert re.search(r"labels: uniform, balanced; samples: 2500, 5000", refused.stdout)


@pytest.mark.long
def test_a_sweep_over_truncation_uses_the_same_latents(job: Path, tmp_path: Path) -> None:
    few = ("--set", "samples.count=200")
    swept = fid(job, *few, "--truncation", "0.5,0,0.5,1")
    assert swept.returncode == 0, swept.stderr[-3000:]
    (place,) = (tmp_path / "undisturbed").glob("truncation-*.json")
    results = json.loads(place.read_text())
    assert [found["protocol"]["truncation"] for found in results] == [0, 0.5, 1]
    # With all styles at the mean of their class there is nothing but the classes.
    recalls = [found["figures"]["recall"] for found in results]
    assert len({found["pixels_sha256"] for found in results}) == 3 and recalls[2] == min(recalls)
    least = min(found["figures"]["frechet"] for found in results)
    line = next(line for line in swept.stdout.splitlines() if "pixels200_shards │" in line)
    assert f"{least:.6g}" in line and re.search(r"truncation .* \* ", swept.stdout)
    assert "discrepancy_1" in swept.stdout and "direction_1" in swept.stdout
    plot = Image.open(place.with_suffix(".png"))
    assert min(plot.size) > 400

    alone = fid(job, *few, "--set", "samples.truncation=0.5", "--json")
    assert alone.returncode == 0 and "ranges of" not in alone.stdout, "it was measured again"
    assert json.loads(alone.stdout) == results[1]


def test_a_published_file_of_the_same_images_is_as_good_as_their_shards(
    job: Path, tmp_path: Path
) -> None:
    folder = locate(f"{tmp_path}/shards")
    reading = Reading(folder, "images", 32, 1, crop=False, num_classes=10)
    pixels, _ = read_images(reading, read_index(folder), 5000)
    exact = moments(grid_means(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy())
    npz = tmp_path / "reference.npz"
    np.savez(npz, arr_0=pixels.repeat(3, axis=3), mu=exact.mean, sigma=exact.covariance)
    few = ("--set", "samples.count=300")
    of_shards = fid(job, *few, "--json")
    of_file = fid(job, *few, "--set", f"reference={npz}", "--json")
    assert (of_shards.returncode, of_file.returncode) == (0, 0), of_file.stderr[-3000:]
    ours, theirs = (
        json.loads(done.stdout[done.stdout.index("{") :]) for done in (of_file, of_shards)
    )
    assert (ours["metric"], theirs["metric"]) == ("pixels300_adm", "pixels300_shards")
    assert ours["pixels_sha256"] == theirs["pixels_sha256"]
    assert ours["figures"] == pytest.approx(theirs["figures"], rel=1e-9)
    assert {"precision", "recall"} < ours["figures"].keys()


def test_precision_and_recall_are_the_same_in_any_number_of_tasks() -> None:
    random = np.random.default_rng(0)
    samples, reals = random.normal(size=(2300, 20)), random.normal(size=(1200, 20)) * 1.3
    one, three = (torch.from_numpy(values) for values in (samples, reals))
    expected = {
        "precision": Balls.round(three).share_inside(one),
        "recall": Balls.round(one).share_inside(three),
    }
    assert 0 < expected["precision"] < 1 and 0 < expected["recall"] < 1
    with connected(2, {}):
        for count in (1, 3):
            workers = Workers(count=count, spare=count == 3)
            assert precision_and_recall(samples, reals, workers) == expected
