"""`cat-ray prepare` and `cat-ray index` as Ray Data jobs, and training on what they leave."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
import webdataset
import yaml
from PIL import Image
from torch import nn

from cat_ray.checkpoint.read import newest, read_state
from cat_ray.data.crop import center_crop
from cat_ray.data.index import INDEX_NAME, read_index
from cat_ray.data.packs import unpack
from cat_ray.data.prepare import RECORDS
from cat_ray.data.read import read_shard
from cat_ray.operations.journal import read_rows
from cat_ray.storage import locate

COMMAND = str(Path(sys.executable).with_name("cat-ray"))
SIDE, WIDTH = 32, 16
KILL_AFTER_SECONDS = 120


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True)


def picture(number: int) -> Image.Image:
    """A smooth picture of its own size, unlike any other."""
    width, height = 33 + number % 40, 33 + number * 7 % 40
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / (3 + number % 5) + channel * columns / 9) for channel in range(3)]
    return Image.fromarray((127 + 120 * np.stack(waves, axis=2)).astype(np.uint8))


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 40 pictures, as ImageNet lies on disks."""
    folder = tmp_path_factory.mktemp("imagenet")
    for number in range(120):
        path = folder / f"n{number % 3:08d}" / f"n{number % 3:08d}_{number}.JPEG"
        path.parent.mkdir(exist_ok=True)
        picture(number).save(path, quality=95)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real AutoencoderKL, tiny and random, as a folder."""
    path = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real DINOv2, tiny and random, as a folder."""
    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    backbone = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=224,
            patch_size=14,
            layerscale_value=1.0,
        )
    )
    nn.init.normal_(backbone.embeddings.position_embeddings)
    backbone.save_pretrained(path)
    return path


def job(path: Path, source: Path, out: Path, **output: object) -> Path:
    sections = {
        "source": {"uri": str(source)},
        "output": {"folder": str(out), "resolution": SIDE, "shard_images": 20, **output},
    }
    path.write_text(yaml.safe_dump(sections))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def prepared(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as shards, in one go."""
    folder = tmp_path_factory.mktemp("prepared")
    result = run("prepare", job(folder / "job.yaml", class_folders, folder / "shards"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "120 images of 3 classes, 3 x 32 x 32, in 6 shards" in result.stdout
    return folder / "shards"


def test_every_picture_is_there_once_cropped_as_adm_does(prepared: Path) -> None:
    place = locate(str(prepared))
    index = read_index(place)
    assert index.class_counts == (40, 40, 40)
    found = {}
    for shard in index.shards:
        for sample in read_shard(place, shard):
            number = int(sample.key.rsplit("_", 1)[1])
            assert int(sample.members["cls"]) == number % 3
            found[number] = np.asarray(Image.open(io.BytesIO(sample.members["png"])))
    assert sorted(found) == list(range(120))
    # Through JPEG once, as the source was.
    encoded = io.BytesIO()
    picture(7).save(encoded, format="JPEG", quality=95)
    expected = center_crop(Image.open(encoded).convert("RGB"), SIDE)
    assert np.array_equal(found[7], np.asarray(expected))
    for name in ("contact.png", "classes.png"):
        with Image.open(prepared / name) as shown:
            shown.load()


def test_killed_three_times_it_leaves_the_same_bytes(
    prepared: Path, class_folders: Path, tmp_path: Path
) -> None:
    """SIGKILL to the command as soon as one more shard is recorded; Ray goes down with it."""
    out, path = tmp_path / "shards", tmp_path / "job.yaml"
    job(path, class_folders, out)
    for kill in range(1, 4):
        with (tmp_path / f"log-{kill}").open("w") as log:
            process = subprocess.Popen([COMMAND, "prepare", str(path)], stdout=log, stderr=log)
            until = time.monotonic() + KILL_AFTER_SECONDS
            while len(list((out / RECORDS).glob("*.json"))) < kill:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert not (out / INDEX_NAME).exists(), "it was over before the kill"
    done = {p.name: p.stat().st_mtime_ns for p in out.glob("train-*.tar")}
    kept = {p.name.removesuffix(".json") for p in (out / RECORDS).iterdir()}
    result = run("prepare", path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert content(out) == content(prepared)
    # What was recorded was not written again.
    assert {n: (out / n).stat().st_mtime_ns for n in kept} == {n: done[n] for n in kept}


def test_latents_and_tokens_go_through_real_networks(
    class_folders: Path, vae: Path, teacher: Path, tmp_path: Path
) -> None:
    path = job(
        tmp_path / "job.yaml",
        class_folders,
        tmp_path / "latents",
        contents="latents",
        pack_images=8,
        tokens=True,
    )
    settings = yaml.safe_load(path.read_text())
    settings |= {
        "latents": {"vae": str(vae)},
        "teacher": {"name": str(teacher), "width": WIDTH, "grid": 2},
        "workers": {"encoders": 2},
    }
    path.write_text(yaml.safe_dump(settings))
    result = run("prepare", path)
    assert result.returncode == 0, result.stderr[-3000:]
    place = locate(str(tmp_path / "latents"))
    index = read_index(place)
    assert (index.contents, index.resolution, index.channels) == ("latents", 4, 4)
    assert (index.images, index.pack_images) == (120, 8)
    assert index.made_with["scaling_factor"] == 0.18215
    pack = unpack(read_shard(place, index.shards[0])[0], index.shards[0].name)
    assert pack.latents.shape == (8, 8, 4, 4) and (pack.latents[:, 4:] > 0).all()
    assert pack.tokens is not None and pack.tokens.shape == (8, 1 + 4, WIDTH)

    # And training on them.
    trained = train(tmp_path, place.uri, "model.resolution=4")
    assert trained.returncode == 0, trained.stderr[-3000:]


def train(tmp_path: Path, shards: str, *changes: str) -> subprocess.CompletedProcess[str]:
    sections = {
        "run": {"folder": str(tmp_path / "run"), "total_images": 64},
        "data": {"shards": shards, "num_classes": 3},
        "model": {
            "stages": 2,
            "channels": 4,
            "generator": {"size": {"depth": 2, "width": 32, "heads": 2}, "patch": 2},
            "discriminator": {
                "size": {"depth": 2, "width": 32, "heads": 2},
                "patch": 2,
                "projection_width": 32,
            },
        },
        "optimisation": {"batch_size": 16, "lanes": 4},
        "workers": {"cpus_per_worker": 0.5, "max_failures": 0},
        "reporting": {"log_every_images": 32, "grid_every_images": 64},
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(sections))
    return run("train", path, *(part for change in changes for part in ("--set", change)))


def test_images_are_encoded_on_the_fly_and_aligned_with_their_teacher(
    prepared: Path, vae: Path, teacher: Path, tmp_path: Path
) -> None:
    result = train(
        tmp_path,
        str(prepared),
        "model.resolution=4",
        f"latents.vae={vae}",
        "objective.alignment.weight=1",
        f"objective.alignment.teacher={teacher}",
        f"objective.alignment.teacher_width={WIDTH}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [row for row in read_rows(locate(str(tmp_path / "run"))) if row["kind"] == "train"]
    assert all(0 < row["alignment"] < 4 for row in rows)
    checkpoint = newest(locate(str(tmp_path / "run")))
    assert checkpoint is not None and read_state(checkpoint).images == 64
    (grid,) = (tmp_path / "run" / "grids").glob("*64.png")
    with Image.open(grid) as shown:
        # Pixels, not latents: eight times as large, and in colour.
        assert shown.mode == "RGB" and shown.size[1] % (4 * 8) == 0


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Shards as the webdataset library writes them by default."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"train-{shard:06d}.tar")) as writer:
            for number in range(10):
                encoded = io.BytesIO()
                picture(number).save(encoded, format="JPEG")
                key = f"{shard}-{number:04d}"
                label = json.dumps({"label": number % 3}).encode()
                writer.write({"__key__": key, "jpg": encoded.getvalue(), "json": label})
    return folder


def test_foreign_shards_are_indexed_and_trained_on(foreign: Path, tmp_path: Path) -> None:
    result = run("index", f"{foreign}/train-{{000000..000001}}.tar", "--verify")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "20 images of 3 classes, of various sizes, in 2 shards" in result.stdout
    trained = train(tmp_path, str(foreign), "model.resolution=16", "model.channels=3")
    assert trained.returncode == 0, trained.stderr[-3000:]


def test_what_is_wrong_with_shards_is_listed(foreign: Path) -> None:
    broken = foreign / "train-000000.tar"
    damaged = bytearray(broken.read_bytes())
    with tarfile.open(broken) as archive:
        first = next(info for info in archive if info.name.endswith(".jpg"))
    damaged[first.offset_data : first.offset_data + first.size] = bytes(first.size)
    broken.write_bytes(bytes(damaged))
    found = run("index", foreign, "--verify", "--num-classes", "2")
    assert found.returncode == 2
    assert "train-000000.tar: 0-0000: not a readable image" in found.stdout
    # The first of them can't be decoded, but has a class.
    assert "class id 2 is not in 0 to 1: train-000000.tar: 0-0002 and 5 more" in found.stdout
    assert (foreign / INDEX_NAME).exists()

    (foreign / INDEX_NAME).unlink()
    (foreign / "train-000001.tar").write_bytes((foreign / "train-000001.tar").read_bytes()[:3000])
    found = run("index", foreign)
    assert found.returncode == 2
    assert "shard train-000001.tar is not a whole tar file" in found.stdout
    assert not (foreign / INDEX_NAME).exists()
