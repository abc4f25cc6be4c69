"""The digits as WebDataset shards: complete, the same every time, indexed last."""

import errno
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from pyarrow import fs
from typer.testing import CliRunner

from cat_ray.cli import app
from cat_ray.config import parse
from cat_ray.data import prepare as module
from cat_ray.data.carried import mnist
from cat_ray.data.decode import decode_sample
from cat_ray.data.found import look
from cat_ray.data.index import (
    EXTENTS_NAME,
    INDEX_NAME,
    Index,
    check_shards,
    read_extents,
    read_index,
)
from cat_ray.data.preparation import Preparation
from cat_ray.data.prepare import (
    BROKEN_NAME,
    CONTACT_NAME,
    HISTOGRAM_NAME,
    JOB_NAME,
    RECORDS,
    digits,
    prepare,
)
from cat_ray.data.read import read_shard
from cat_ray.data.tar import RawSample, sample_extents
from cat_ray.data.writable import check_writable
from cat_ray.errors import BadInput
from cat_ray.folder_lock import locked
from cat_ray.section import Storage
from cat_ray.storage import Location, locate

Prepared = tuple[Location, Index]
Labelled = tuple[np.ndarray, np.ndarray]
# Job, what people look at, then extents and index.
FILES_AROUND = (JOB_NAME, BROKEN_NAME, HISTOGRAM_NAME, CONTACT_NAME, EXTENTS_NAME, INDEX_NAME)


@pytest.fixture(scope="module")
def source() -> Labelled:
    return mnist()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = locate(str(tmp_path_factory.mktemp("digits")))
    return folder, prepare(digits(folder.uri, Storage()))


@pytest.fixture(scope="module")
def samples(prepared: Prepared) -> list[RawSample]:
    folder, index = prepared
    return [sample for shard in index.shards for sample in read_shard(folder, shard)]


def put_in_place_of_the_digits(patch: pytest.MonkeyPatch, images: Labelled) -> None:
    for name in ("carried", "sources"):
        patch.setattr(f"cat_ray.data.{name}.mnist", lambda: images)


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> Labelled:
    """20 images that take no time, in place of the digits."""
    images = np.arange(20 * 16, dtype=np.uint16).reshape(20, 4, 4).astype(np.uint8)
    few = images, np.arange(20) % 3
    put_in_place_of_the_digits(monkeypatch, few)
    return few


def job(folder: Location, **changes: object) -> Preparation:
    """The digits' job with other settings of the output."""
    plain = digits(folder.uri, Storage())
    small = {"resolution": 4, **changes}
    return plain.model_copy(update={"output": plain.output.model_copy(update=small)})


def content(folder: Location) -> dict[str, bytes]:
    root = Path(folder.path)
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def decoded(sample: RawSample, side: int = 32, channels: int = 1) -> tuple[np.ndarray, int]:
    pixels = np.empty((side, side, channels), np.uint8)
    label = decode_sample(sample, 10, False, pixels)
    return pixels.squeeze(), label


def test_the_same_source_gives_the_same_bytes(prepared, tmp_path, monkeypatch):
    # On another day.
    monkeypatch.setattr("time.time", lambda: 1.0)
    again = locate(str(tmp_path))
    prepare(digits(again.uri, Storage()))
    assert content(again) == content(prepared[0])


def test_the_index_tells_what_lies_there(prepared):
    folder, index = prepared
    assert read_index(folder) == index
    check_shards(index, folder)
    assert (index.images, index.resolution, index.channels) == (5000, 32, 1)
    assert index.class_counts == (500,) * 10
    assert sorted(content(folder)) == sorted([*FILES_AROUND, *(s.name for s in index.shards)])
    extents = read_extents(folder, index)
    for shard in index.shards:
        assert extents[shard.name].tolist() == sample_extents(folder / shard.name)
    for shard in index.shards:
        assert hashlib.sha256((folder / shard.name).read()).hexdigest() == shard.sha256


def test_each_digit_is_there_once_with_its_class(samples, source):
    assert len(source[1]) == 5000
    keys = Counter(sample.key for sample in samples)
    assert keys == Counter(f"{n:08d}" for n in range(5000))
    labels = [int(sample.members["cls"]) for sample in samples]
    assert labels == [source[1][int(sample.key)] for sample in samples]
    assert Counter(labels) == {label: 500 for label in range(10)}


def test_a_digit_is_kept_exactly_and_padded_with_black(samples, source):
    for sample in samples[::50]:
        image, label = decoded(sample)
        assert np.array_equal(image, source[0][int(sample.key)])
        assert label == source[1][int(sample.key)]
    assert source[0][:, 2:30, 2:30].any(axis=(1, 2)).all()
    frame = source[0].copy()
    frame[:, 2:30, 2:30] = 0
    assert not frame.any()


def test_the_digits_are_shuffled_over_the_shards(prepared, samples):
    # The source has them class by class.
    for first in range(0, 5000, 500):
        labels = Counter(int(sample.members["cls"]) for sample in samples[first : first + 500])
        assert min(labels[label] for label in range(10)) > 20


def test_the_webdataset_library_reads_the_shards(prepared, samples):
    folder, index = prepared
    place = str(Path(folder.path) / index.shards[3].name)
    read = list(webdataset.WebDataset(place, shardshuffle=False).decode("l8"))
    expected = samples[1500:2000]
    assert [row["__key__"] for row in read] == [sample.key for sample in expected]
    for row, sample in zip(read, expected, strict=True):
        image, label = decoded(sample)
        assert row["cls"] == label
        assert np.array_equal(row["png"], image)


def test_no_name_and_no_time_of_the_maker_is_in_a_shard(few_digits, tmp_path):
    prepare(job(locate(str(tmp_path))))
    with tarfile.open(tmp_path / "train-000000.tar") as archive:
        entries = archive.getmembers()
    assert len(entries) == 40
    assert {(e.mtime, e.uname, e.gname) for e in entries} == {(0, "", "")}


@pytest.mark.parametrize(("shard_images", "counts"), [(20, [20]), (8, [8, 8, 4]), (50, [20])])
def test_shards_have_the_size_that_was_asked_for(few_digits, tmp_path, shard_images, counts):
    folder = locate(str(tmp_path))
    index = prepare(job(folder, shard_images=shard_images))
    assert [shard.count for shard in index.shards] == counts
    assert [len(read_shard(folder, shard)) for shard in index.shards] == counts
    assert index.class_counts == (7, 7, 6)


def test_colour_images_have_three_channels(few_digits, tmp_path, monkeypatch):
    images, labels = few_digits
    colour = np.stack([images, 255 - images, images // 2], axis=3)
    put_in_place_of_the_digits(monkeypatch, (colour, labels))
    folder = locate(str(tmp_path))
    index = prepare(job(folder, channels=3))
    assert (index.channels, index.resolution) == (3, 4)
    sample = read_shard(folder, index.shards[0])[0]
    assert np.array_equal(decoded(sample, 4, 3)[0], colour[int(sample.key)])


def test_original_files_keep_their_bytes_and_have_various_sizes(few_digits, tmp_path):
    folder = locate(str(tmp_path))
    index = prepare(job(folder, encoding="original", resolution=256))
    assert index.resolution is None
    (shard,) = index.shards
    for sample in read_shard(folder, shard):
        with Image.open(io.BytesIO(sample.members["png"])) as image:
            assert np.array_equal(np.asarray(image), few_digits[0][int(sample.key)])


def test_a_jpeg_is_close_to_what_it_was_made_from(few_digits, tmp_path):
    folder = locate(str(tmp_path))
    index = prepare(job(folder, encoding="jpeg"))
    for sample in read_shard(folder, index.shards[0]):
        assert sample.members.keys() == {"jpg", "cls"}
        image, _ = decoded(sample, 4)
        assert np.abs(image.astype(int) - few_digits[0][int(sample.key)]).max() <= 8


def test_the_same_job_again_does_nothing(few_digits, tmp_path, monkeypatch):
    folder = locate(str(tmp_path))
    index = prepare(job(folder))
    before = content(folder)

    def refuse(*_: object) -> None:
        raise AssertionError("a shard was written again")

    monkeypatch.setattr(Location, "upload", refuse)
    assert prepare(job(folder)) == index
    assert content(folder) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shard_images": 3}, "output.shard_images: 500 -> 3"),
        ({"seed": 1}, "output.seed: 0 -> 1"),
        ({"resolution": 2}, "output.resolution: 4 -> 2"),
        ({"encoding": "jpeg"}, "output.encoding: png -> jpeg"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_job_in_a_folder_is_refused_and_the_folder_left_alone(
    few_digits, tmp_path, changes, told, finished
):
    folder = locate(str(tmp_path))
    prepare(job(folder))
    if not finished:
        (folder / INDEX_NAME).delete()
    before = content(folder)
    words = re.escape(f"{folder.uri} was begun with another job ({told}): ")
    with pytest.raises(BadInput, match=words + ".*choose another output.folder"):
        prepare(job(folder, **changes))
    assert content(folder) == before


def test_a_job_that_failed_before_it_wrote_anything_gives_way(few_digits, tmp_path, monkeypatch):
    folder, module = locate(str(tmp_path)), "cat_ray.data.prepare"
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.write_shard_file", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(job(folder))
    assert list(content(folder))
    assert prepare(job(folder, seed=7)).images == 20


def test_a_source_that_changed_is_refused(few_digits, tmp_path, monkeypatch):
    folder = locate(str(tmp_path))
    prepare(job(folder))
    put_in_place_of_the_digits(monkeypatch, (few_digits[0][:19], few_digits[1][:19]))
    before = content(folder)
    with pytest.raises(BadInput, match=re.escape("was begun with another job (samples)")):
        prepare(job(folder))
    assert content(folder) == before


def test_who_does_it_and_where_the_storage_is_may_change(few_digits, tmp_path):
    folder = locate(str(tmp_path))
    index = prepare(job(folder))
    changes = {
        "storage": Storage(region="eu-north-1", retry_seconds=1),
        "workers": job(folder).workers.model_copy(update={"cpus_per_task": 2.0}),
    }
    assert prepare(job(folder).model_copy(update=changes)) == index


@pytest.mark.parametrize("name", ["thesis.tex", "photos/cat.png", INDEX_NAME])
def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(few_digits, tmp_path, name):
    folder = locate(str(tmp_path))
    (folder / name).write(b"precious")
    with pytest.raises(BadInput, match=re.escape(folder.uri) + ".*choose another output.folder"):
        prepare(job(folder))
    assert content(folder) == {name: b"precious"}


JOB = "{source: {kind: mnist}, output: {folder: FOLDER}}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("source.kind=imagnet", "source.kind: Input should be 'auto', 'folders', 'tars'"),
        ("source.kind=folders", "source.uri must say where the images are"),
        ("source.ury=x", "unknown key source.ury, did you mean source.uri?"),
        ("output.contents=latents", "latents.vae must name the VAE"),
        ("output.tokens=true", "output.tokens goes with output.contents: latents"),
        ("output.shard_images=0", "output.shard_images: Input should be greater than 0"),
    ],
)
def test_a_job_that_cannot_be_is_refused_before_anything_is_written(tmp_path, change, told):
    text = JOB.replace("FOLDER", str(tmp_path / "new"))
    with pytest.raises(BadInput) as caught:
        prepare(parse(text, "job", [change], Preparation))
    assert told in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", ["resolution: 36", "channels: 1"])
def test_a_vae_takes_three_channels_and_a_multiple_of_eight(change):
    text = f"""
    source: {{kind: photographs}}
    output: {{folder: f, contents: latents, {change}}}
    latents: {{vae: a-vae}}
    """
    with pytest.raises(BadInput, match="3 channels and a side that is a multiple of 8"):
        parse(text, "job", kind=Preparation)


# Three shards with a record each, and what lies around them.
WRITES = 2 * 3 + len(FILES_AROUND)


@pytest.mark.parametrize("writes", range(WRITES))
def test_a_kill_leaves_no_index_and_the_next_call_finishes(
    few_digits, tmp_path, monkeypatch, writes
):
    whole, killed = locate(str(tmp_path / "whole")), locate(str(tmp_path / "killed"))
    prepare(job(whole, shard_images=7))
    done: list[str] = []

    def until_killed(act):
        def wrapped(place: Location, content: bytes | Path) -> None:
            if len(done) == writes:
                raise KeyboardInterrupt
            act(place, content)
            done.append(place.name)

        return wrapped

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Location, "upload", until_killed(Location.upload))
        patched.setattr(Location, "write", until_killed(Location.write))
        prepare(job(killed, shard_images=7))
    assert INDEX_NAME not in done
    with pytest.raises(BadInput, match=r"has no index\.json"):
        read_index(killed)
    again: list[str] = []
    upload = Location.upload

    def uploaded(place: Location, path: Path) -> None:
        again.append(place.name)
        upload(place, path)

    monkeypatch.setattr(Location, "upload", uploaded)
    prepare(job(killed, shard_images=7))
    assert content(killed) == content(whole)
    # A shard with a record is done.
    recorded = {name.removesuffix(".json") for name in done if name.startswith("train-")}
    finished = {name for name in recorded if f"{name}.json" in done}
    assert len(again) == 3 - len(finished)
    assert not finished & set(again)


def test_nothing_is_left_of_the_records_of_the_work(few_digits, tmp_path):
    prepare(job(locate(str(tmp_path)), shard_images=3))
    assert not (tmp_path / RECORDS).exists()


def test_people_are_shown_the_classes_and_the_pictures(prepared):
    folder, _ = prepared
    for name in (HISTOGRAM_NAME, CONTACT_NAME):
        with Image.open(io.BytesIO((folder / name).read())) as image:
            assert image.format == "PNG"
            assert min(image.size) >= 200
    assert json.loads((folder / BROKEN_NAME).read()) == []


def test_a_png_in_a_shard_is_an_image_file(prepared, samples, tmp_path):
    path = tmp_path / "digit.png"
    path.write_bytes(samples[0].members["png"])
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))


# What is looked at before the work.


def class_folders(root: Path) -> Path:
    for number in range(4):
        path = root / f"n0{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(path)
    (root / "n00" / "a.bmp").write_bytes(b"x")
    return root


def folders_job(source: Path, out: Path, **changes: object) -> Preparation:
    text = {"uri": str(source), **changes}, {"folder": str(out), "resolution": 4}
    return Preparation.model_validate({"source": text[0], "output": text[1]})


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(job, source, folder, left, total):
        for plan in left:
            module._write_one(job, source, folder, plan, None)

    monkeypatch.setattr(module, "_write", write)


def test_what_was_found_and_what_is_left_out_is_told_before_anything_is_written(
    tmp_path, monkeypatch, without_ray
):
    lines: list[str] = []
    monkeypatch.setattr(module, "write_shard_file", lambda *_: pytest.fail("written too early"))

    def tell(line: str) -> None:
        lines.append(line)
        raise KeyboardInterrupt

    made = folders_job(class_folders(tmp_path / "set"), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        prepare(made, tell)
    assert lines == [
        f"found 4 samples in {tmp_path}/set (folders), class 0 is n00, class 1 is n01\n"
        "left out: .bmp (1)"
    ]


def test_a_dry_run_tells_the_same_and_writes_nothing(tmp_path):
    path, out = tmp_path / "job.json", tmp_path / "out"
    path.write_text(folders_job(class_folders(tmp_path / "set"), out).model_dump_json())
    result = CliRunner().invoke(app, ["prepare", str(path), "--dry-run"])
    assert result.exit_code == 0
    assert "found 4 samples" in result.output and "left out: .bmp (1)" in result.output
    assert not out.exists()
    (tmp_path / "set" / "n02").mkdir()
    result = CliRunner().invoke(app, ["prepare", str(path)])
    assert result.exit_code == 2
    assert "no images are in n02" in result.output and not out.exists()


def test_one_class_and_numbered_classes_are_told(tmp_path):
    for number in range(11):
        (tmp_path / "numbers" / str(number)).mkdir(parents=True)
        (tmp_path / "numbers" / str(number) / "a.png").write_bytes(b"x")
    told = look(folders_job(tmp_path / "numbers", tmp_path / "out")).describe()
    assert "classes are in the order of their names as text: 10 is 2, 2 is 3" in told
    told = look(folders_job(tmp_path / "numbers" / "3", tmp_path / "out")).describe()
    assert "all of one class, 3, for unconditional training" in told


def test_a_job_from_before_there_were_patterns_goes_on(tmp_path, without_ray):
    """What `preparation.json` held on commit e108eef."""
    made = folders_job(class_folders(tmp_path / "set"), tmp_path / "out")
    index = prepare(made)
    own = json.loads((tmp_path / "out" / JOB_NAME).read_text())
    listed = own.pop("samples")
    assert own == {
        "classes": ["n00", "n01"],
        "source": {
            "uri": f"{tmp_path}/set",
            "kind": "folders",
            "image_column": "image",
            "label_column": "label",
            "crops": "256",
        },
        "output": {
            "contents": "images",
            "resolution": 4,
            "channels": 3,
            "encoding": "png",
            "shard_images": 5000,
            "pack_images": 64,
            "tokens": False,
            "seed": 0,
        },
        "latents": {"vae": None, "revision": None},
        "teacher": {"name": "facebook/dinov2-base", "width": 768, "grid": 16},
    }
    sizes = {p: (tmp_path / "set" / p).stat().st_size for p in ("n00/0.png", "n00/2.png")}
    sizes |= {p: (tmp_path / "set" / p).stat().st_size for p in ("n01/1.png", "n01/3.png")}
    units = [
        {"file": p, "begin": 0, "end": n, "count": 1, "key": p[:-4], "label": int(p[2])}
        for p, n in sizes.items()
    ]
    assert listed == hashlib.sha256(json.dumps(units).encode()).hexdigest()
    assert index.shards[0].count == 4
    with pytest.raises(BadInput, match=r"source\.pattern: None -> \*\.png"):
        prepare(folders_job(tmp_path / "set", tmp_path / "out", pattern="*.png"))


def test_a_folder_that_is_read_only_is_found_before_the_source_is_read(tmp_path, monkeypatch):
    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(
        "cat_ray.data.found.list_units", lambda *_: pytest.fail("the source was read")
    )
    words = "out: .*Read-only file system.*: choose another output.folder"
    with pytest.raises(BadInput, match=words):
        prepare(folders_job(tmp_path, tmp_path / "out"))
    (tmp_path / "out").mkdir()
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    place = Location(store, "out", "s3://bucket/out")
    check_writable(place, "choose another")
    assert not place.files_below()

    def denied(*_: object) -> None:
        raise BadInput("storage failed at s3://bucket/out: ACCESS_DENIED")

    monkeypatch.setattr(Location, "write", denied)
    with pytest.raises(BadInput, match="ACCESS_DENIED: choose another"):
        check_writable(place, "choose another")


def test_a_sample_that_cannot_be_used_is_told_with_its_reason(tmp_path, without_ray):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar", "w") as archive:
        png = io.BytesIO()
        Image.new("RGB", (8, 8)).save(png, format="PNG")
        for name, held in (("0.png", png.getvalue()), ("0.cls", b"1"), ("1.png", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(held)
            archive.addfile(info, io.BytesIO(held))
    prepare(folders_job(tmp_path / "set", tmp_path / "out"))
    (line,) = json.loads((tmp_path / "out" / BROKEN_NAME).read_text())
    assert line.startswith("a/1: it has no class: a .cls member")


def test_a_second_prepare_of_the_same_folder_is_refused_and_told_who_is_at_it(tmp_path):
    folder = locate(str(tmp_path / "shards"))
    with (
        locked(folder, "cat-ray prepare"),
        pytest.raises(BadInput, match=r"is in use by `cat-ray prepare` on "),
    ):
        prepare(digits(folder.uri, Storage()))
    assert not (folder / JOB_NAME).exists()


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"null", 10**5 * b"["])
def test_a_damaged_job_of_before_is_told_and_left_as_it_is(few_digits, tmp_path, content):
    ours = job(locate(str(tmp_path)), shard_images=3)
    prepare(ours)
    (tmp_path / "preparation.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"preparation\.json is damaged: restore it"):
        prepare(ours)
    assert (tmp_path / "preparation.json").read_bytes() == content


def test_what_somebody_put_among_the_records_stays(few_digits, tmp_path):
    ours = job(locate(str(tmp_path)), shard_images=3)
    prepare(ours)
    records = tmp_path / RECORDS
    (records / "mine").mkdir(parents=True)
    (records / "mine" / "thesis.txt").write_text("x")
    (records / "notes.txt").write_text("x")
    prepare(ours)
    assert sorted(path.name for path in records.rglob("*")) == ["mine", "notes.txt", "thesis.txt"]
