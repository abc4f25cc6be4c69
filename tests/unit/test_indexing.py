"""`cat-ray index` on shards as others make them, and as attackers do, without a cluster."""

import contextlib
import errno
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from cat_ray.cli import app
from cat_ray.data import indexing
from cat_ray.data.decode import decode_image
from cat_ray.data.image_file import BrokenSample
from cat_ray.data.index import INDEX_NAME, read_extents, read_index
from cat_ray.data.read import Reading, read_images
from cat_ray.data.sources import Source, list_units
from cat_ray.data.tar import sample_extents
from cat_ray.errors import BadInput
from cat_ray.storage import locate

SIDE = 8
Members = Sequence[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks run here, one after the other."""
    monkeypatch.setattr(
        indexing, "run_tasks", lambda task, rows, cpus, **more: (task(row, **more) for row in rows)
    )
    monkeypatch.setattr(indexing, "connected", lambda *arguments: contextlib.nullcontext())


def picture(value: int, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (value, value, value)).save(content, format=kind)
    return content.getvalue()


def six() -> list[tuple[str, bytes]]:
    return [
        (f"{n:04d}.{ending}", content)
        for n in range(6)
        for ending, content in (("png", picture(n)), ("cls", str(n % 2).encode()))
    ]


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def index(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["index", *map(str, arguments)])


def refused(result: Result, folder: Path, *told: str) -> str:
    """One message, exit code 2, and no index."""
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert all(words in line for words in told), line
    assert {path.suffix for path in folder.iterdir()} <= {".tar"}
    return line


DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(138)
AROUND = {
    "macOS": [pair for name, c in six() for pair in ((f"._{name}", DOUBLE), (name, c))],
    "macOS with ./": [
        pair for name, c in six() for pair in ((f"./._{name}", DOUBLE), (f"./{name}", c))
    ],
    "other files": [("LICENSE", b"text"), ("__meta__.json", b"{}"), *six(), (".DS_Store", b"x")],
}


@pytest.mark.parametrize("case", AROUND)
def test_what_belongs_to_no_sample_is_told_and_is_no_problem(tmp_path, case):
    write_tar(tmp_path / "train-000000.tar", AROUND[case])
    result = index(tmp_path, "--verify")
    assert (result.exit_code, result.stderr) == (0, "")
    left_out = len(AROUND[case]) - len(six())
    assert f"{left_out} members belong to no sample, such as train-000000.tar: " in result.stdout
    place = locate(str(tmp_path))
    found = read_index(place)
    assert (found.images, found.class_counts, found.resolution) == (6, (3, 3), SIDE)
    extents = read_extents(place, found)["train-000000.tar"].tolist()
    assert extents == sample_extents(place / "train-000000.tar")
    reading = Reading(place, "images", SIDE, 3, crop=False, num_classes=2)
    images, labels = read_images(reading, found, 9)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("label", [9_999_999_999, 10**6, -1])
@pytest.mark.parametrize("more", [(), ("--num-classes", "10"), ("--num-classes", 10**12)])
def test_one_class_id_that_can_be_none_is_one_line(tmp_path, label, more):
    write_tar(tmp_path / "0.tar", [*six(), ("b.png", picture(0)), ("b.cls", str(label).encode())])
    refused(index(tmp_path, *more), tmp_path, f"class id {label} is not in 0 to", "0.tar: b")


def test_an_image_of_another_format_is_a_broken_sample(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n"), ("a.cls", b"0")])
    refused(index(tmp_path), tmp_path, "0.tar: a: not a readable image", "JPEG, PNG, WEBP or GIF")


def test_a_sample_twice_side_by_side_is_told(tmp_path):
    write_tar(tmp_path / "0.tar", [*six()[:4], *six()[2:]])
    refused(index(tmp_path), tmp_path, "shard 0.tar: 0001.png, 0001.cls is there twice")


def test_a_shard_that_ends_early_is_one_line(tmp_path):
    path = write_tar(tmp_path / "0.tar", six())
    path.write_bytes(path.read_bytes()[:700])
    refused(index(tmp_path), tmp_path, 'member "0000.png" is truncated at byte 700')


def test_two_tars_in_one_file_are_one_line(tmp_path):
    path = write_tar(tmp_path / "0.tar", six())
    path.write_bytes(path.read_bytes() * 2)
    refused(index(tmp_path), tmp_path, "another one begins behind its end", "tar -A")


def test_shards_without_a_sample_are_one_line(tmp_path):
    write_tar(tmp_path / "0.tar", [("LICENSE", b"text")])
    refused(index(tmp_path), tmp_path, "there is no sample in 0.tar")


def test_names_that_a_terminal_would_obey_are_shown_escaped_and_in_one_line(tmp_path):
    write_tar(tmp_path / "0.tar", [*six(), ("\x1b[31m\nred\udcff.png", b"x"), ("c.png", b"x")])
    result = index(tmp_path)
    assert result.exit_code == 2
    assert "0.tar: \\x1b[31m\\nred\\xdcff: not a readable image" in result.stdout
    assert not set("\x1b\r") & set(result.stdout + result.stderr)


def test_several_uris_of_one_folder_are_indexed_in_their_order(tmp_path):
    for n in range(3):
        write_tar(tmp_path / f"{n}.tar", [(f"{n}-{name}", content) for name, content in six()])
    (tmp_path / "._0.tar").write_bytes(DOUBLE)
    for arguments, names in (
        ([tmp_path / "2.tar", tmp_path / "0.tar"], ["2.tar", "0.tar"]),
        ([f"{tmp_path}/{{0..2}}.tar"], ["0.tar", "1.tar", "2.tar"]),
        ([tmp_path], ["0.tar", "1.tar", "2.tar"]),
    ):
        result = index(*arguments)
        assert result.exit_code == 0, result.stderr
        assert [shard.name for shard in read_index(locate(str(tmp_path))).shards] == names


def test_a_shard_in_the_working_folder_needs_no_path(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", six())
    monkeypatch.chdir(tmp_path)
    assert index("0.tar").exit_code == 0
    assert (tmp_path / INDEX_NAME).exists()


def test_uris_of_two_folders_are_one_line(tmp_path):
    result = index(tmp_path / "a" / "0.tar", tmp_path / "b" / "0.tar")
    refused(result, tmp_path, "are two folders: an index tells of the shards of one")


def test_a_read_only_folder_is_found_before_anything_is_read(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", six())

    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    def run_tasks(*arguments: object, **named: object) -> None:
        raise AssertionError("the shards were read")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(indexing, "run_tasks", run_tasks)
    refused(index(tmp_path), tmp_path, str(tmp_path), "Read-only file system", "so copy them")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", six())
    tmp_path.chmod(0o500)
    refused(index(tmp_path), tmp_path, "Permission denied")


def test_a_name_that_is_no_utf_8_is_one_line(tmp_path):
    write_tar(tmp_path / "0.tar", six())
    (tmp_path / os.fsdecode(b"tr\xe9.tar")).write_bytes(b"x")
    refused(index(tmp_path), tmp_path, "a file whose name is not UTF-8", r"tr\xe9.tar", "rename it")


def test_an_index_is_what_it_was_before(tmp_path):
    """Byte for byte, of plain shards: it is part of a run's identity."""
    write_tar(tmp_path / "0.tar", six())
    assert index(tmp_path, "--verify").exit_code == 0
    values = json.loads((tmp_path / INDEX_NAME).read_bytes())
    sha256 = values["shards"][0].pop("sha256")
    assert len(sha256) == 64 and len(values.pop("extents_sha256")) == 64
    assert values == {
        "format": 2,
        "contents": "images",
        "resolution": SIDE,
        "channels": 3,
        "class_counts": [3, 3],
        "source": f"indexed at {tmp_path}",
        "shards": [{"name": "0.tar", "count": 6, "bytes": 20480}],
        "pack_images": 1,
        "made_with": {},
    }
    extents = read_extents(locate(str(tmp_path)), read_index(locate(str(tmp_path))))
    assert extents["0.tar"].tolist() == [2048 * n for n in range(7)]


def test_another_programs_index_is_not_replaced(tmp_path):
    write_tar(tmp_path / "a-000000.tar", six())
    foreign = tmp_path / "index.json"
    foreign.write_text('{"wids_version": 1, "shardlist": []}')
    result = index(tmp_path)
    assert result.exit_code == 2 and "is another program's" in result.stderr
    assert foreign.read_text() == '{"wids_version": 1, "shardlist": []}'
    # Half a file tells nothing, and may be ours.
    foreign.write_text('{"format": ')
    assert index(tmp_path).exit_code == 0


def test_a_class_tar_with_images_in_several_folders_is_refused(tmp_path):
    for name in ("part1", "part2"):
        members = [(f"./{folder}/{n}.png", picture(n)) for folder in ("n01", "n02") for n in (1, 2)]
        write_tar(tmp_path / f"{name}.tar", members)
    with pytest.raises(BadInput, match=r"part1.tar holds images in several folders, n01.* n02"):
        list_units(Source("tars", locate(str(tmp_path))), Counter())


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_that_was_cut_and_given_an_end_is_a_broken_sample(tmp_path, options):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "JPEG", **options)
    cut = content.getvalue()[: len(content.getvalue()) // 2] + b"\xff\xd9"
    write_tar(tmp_path / "0.tar", [("a.jpg", content.getvalue()), ("a.cls", b"0")])
    assert index(tmp_path, "--verify").exit_code == 0
    (tmp_path / "index.json").unlink()
    (tmp_path / "extents.safetensors").unlink()
    write_tar(tmp_path / "0.tar", [("a.jpg", cut), ("a.cls", b"0")])
    refused(index(tmp_path, "--verify"), tmp_path, "0.tar: a: ", "a part of it is missing")
    for crop in (False, True):
        with pytest.raises(BrokenSample, match="a part of it is missing"):
            decode_image(cut, 3, 64, crop, np.empty((64, 64, 3), np.uint8))
