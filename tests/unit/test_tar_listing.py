"""Tar files as sources: samples with their labels, or one line; nothing is lost uncounted."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from cat_ray.data.sources import Encoded, Source, guess_kind, list_units, read_unit
from cat_ray.errors import BadInput
from cat_ray.storage import locate

DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(138)


def tar(path: Path, members: Iterable[tuple[str, bytes | tarfile.TarInfo]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path.parent


def labelled(numbers: Iterable[int], form: str = "{:04d}") -> list[tuple[str, bytes]]:
    """Samples whose content is their number, and whose class that of it modulo 2."""
    return [
        member
        for n in numbers
        for member in (
            (f"{form.format(n)}.jpg", str(n).encode()),
            (f"{form.format(n)}.cls", str(n % 2).encode()),
        )
    ]


def read(folder: Path, pattern: str = "") -> tuple[str, list[Encoded], Counter[str]]:
    place = locate(str(folder))
    source = Source(guess_kind(place, pattern), place, pattern=pattern)
    left_out = Counter[str]()
    units, _ = list_units(source, left_out)
    return source.kind, [sample for unit in units for sample in read_unit(source, unit)], left_out


def hard_link(name: str, to: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.LNKTYPE, to
    return info


def test_names_with_dots_do_not_lose_their_labels_without_a_word(tmp_path):
    folder = tar(tmp_path / "s" / "train-000000.tar", labelled(range(6), "IMG_2024.05.{:02d}"))
    with pytest.raises(BadInput, match=r"IMG_2024\.05\.00\.jpg has dots in its name"):
        read(folder)
    folder = tar(tmp_path / "d" / "train-000000.tar", labelled(range(6), "class.v1/{:04d}"))
    kind, samples, left_out = read(folder)
    assert (kind, left_out) == ("webdataset", {})
    assert [(s.label, s.content) for s in samples] == [(n % 2, b"%d" % n) for n in range(6)]


def test_further_members_may_have_two_endings(tmp_path):
    members = [("0.jpg", b"0"), ("0.cls", b"1"), ("0.mask.png", b"m"), ("0.depth.v2.npy", b"d")]
    _, samples, left_out = read(tar(tmp_path / "s" / "a.tar", members))
    assert [(s.label, s.content) for s in samples] == [(1, b"0")]
    assert not left_out


def test_a_member_that_comes_twice_is_named(tmp_path):
    twice = labelled([0, 1, 2, 2, 3])
    with pytest.raises(BadInput, match=r"shard train\.tar holds 0002\.jpg twice, one after"):
        read(tar(tmp_path / "again" / "train.tar", twice))
    anew = [("0000.jpg", b"a"), ("0000.cls", b"0"), ("0000.jpg", b"b"), ("0000.cls", b"1")]
    with pytest.raises(BadInput, match=r"holds 0000\.jpg twice"):
        read(tar(tmp_path / "anew" / "train.tar", anew))


def test_a_sample_that_comes_twice_or_in_parts_is_named(tmp_path):
    for name, members in (("twice", labelled([0, 1, 0])), ("parts", sorted(labelled(range(3))))):
        apart = sorted(members, key=lambda member: member[0][-3:]) if name == "parts" else members
        with pytest.raises(BadInput, match="holds the sample 0000 twice, or its members apart"):
            read(tar(tmp_path / name / "train.tar", apart))


@pytest.mark.parametrize("prefix", ["", "./"])
def test_what_a_mac_puts_between_members_is_left_out(tmp_path, prefix):
    members = [
        each
        for name, content in labelled(range(6))
        for each in ((f"{prefix}._{name}", DOUBLE), (f"{prefix}{name}", content))
    ]
    kind, samples, _ = read(tar(tmp_path / "mac" / "train-000000.tar", members))
    assert kind == "webdataset"
    assert [(s.label, s.content) for s in samples] == [(n % 2, b"%d" % n) for n in range(6)]


def test_members_without_an_ending_and_those_on_the_shard_are_no_samples(tmp_path):
    around = [("LICENSE", b"text"), ("__meta__.json", b"{}")]
    members = [*around, *labelled(range(6)), (".DS_Store", b"x")]
    _, samples, left_out = read(tar(tmp_path / "extra" / "train-000000.tar", members))
    assert [s.label for s in samples] == [0, 1] * 3
    assert left_out["without an ending"] == left_out["__meta__.json"] == 1


def test_links_in_a_tar_are_counted(tmp_path):
    members = [*labelled(range(3)), ("", hard_link("0003.jpg", "0002.jpg")), *labelled([4])]
    members += [("", hard_link("0005.jpg", "0004.jpg"))]
    _, samples, left_out = read(tar(tmp_path / "links" / "train.tar", members))
    assert [s.content for s in samples] == [b"0", b"1", b"2", b"4"]
    (reason,) = left_out
    assert left_out[reason] == 2 and "--hard-dereference" in reason


def test_samples_without_image_or_class_are_counted_before_the_work(tmp_path):
    members = [*labelled(range(4)), ("8.txt", b"a cat"), ("9.jpg", b"9")]
    _, samples, left_out = read(tar(tmp_path / "some" / "train.tar", members))
    assert left_out == {"samples without an image": 1, "samples without a class": 1}
    assert [s.problem[:12] for s in samples if s.problem] == ["it has no im", "it has no cl"]


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        (("txt", b"a cat"), "it has no class"),
        (("json", b'{"caption": "a cat"}'), "it has no class"),
        (("cls", b"cat"), "is not a number"),
        (("cls", b"-1"), "its class is -1"),
        (("cls", b"9999999999"), "its class 9999999999 is above 999999"),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_shards_without_classes_do_not_become_a_class_each(tmp_path, beside, told, shards):
    ending, content = beside
    for shard in range(shards):
        members = [m for n in range(3) for m in ((f"{n}.jpg", b"x"), (f"{n}.{ending}", content))]
        tar(tmp_path / "captions" / f"{shard:05d}.tar", members)
    with pytest.raises(BadInput, match=f"none of [0-9]+ samples .* has a class: .*{told}"):
        read(tmp_path / "captions")


@pytest.mark.parametrize("names", [("train-000000", "train-000001"), ("00000", "00001", "00002")])
def test_numbered_tars_of_images_only_are_classes_only_if_told_so(tmp_path, names):
    for name in names:
        tar(tmp_path / "set" / f"{name}.tar", [(f"{name}_0.jpg", b"x")])
    with pytest.raises(BadInput, match=r"hold images without classes: .*source\.kind: tars"):
        read(tmp_path / "set")
    _, classes = list_units(Source("tars", locate(f"{tmp_path}/set")))
    assert classes == names


def test_class_tars_from_a_mac_are_classes_without_its_companions(tmp_path):
    for name in ("n01", "n02", "n03"):
        inner = [(f"._{name}_{n}.JPEG", DOUBLE) for n in range(3)]
        images = [(f"{name}_{n}.JPEG", b"x") for n in range(3 if name != "n02" else 0)]
        tar(tmp_path / "folder" / f"{name}.tar", [*inner, *images, ("README", b"x")])
        (tmp_path / "folder" / f"._{name}.tar").write_bytes(DOUBLE)
    files = sorted((tmp_path / "folder").iterdir())
    tar(tmp_path / "outer" / "all.tar", [(file.name, file.read_bytes()) for file in files])
    for place in (tmp_path / "folder", tmp_path / "outer" / "all.tar"):
        source = Source(guess_kind(locate(str(place))), locate(str(place)))
        left_out = Counter[str]()
        units, classes = list_units(source, left_out)
        assert source.kind == "tars" and classes == ("n01", "n02", "n03")
        assert Counter(unit.label for unit in units) == {0: 3, 2: 3}
        assert left_out["without an ending"] == 3
        assert left_out["classes without an image (n02)"] == 1


def test_a_tar_whose_link_leads_nowhere_is_named(tmp_path):
    for name in ("n01", "n03"):
        tar(tmp_path / "set" / f"{name}.tar", [(f"{name}_0.JPEG", b"x")])
    (tmp_path / "set" / "n02.tar").symlink_to("../gone/n02.tar")
    with pytest.raises(BadInput, match=r"n02\.tar is a link to \.\./gone/n02\.tar, which leads"):
        read(tmp_path / "set")


def test_splits_of_shards_are_told_and_a_pattern_selects_one(tmp_path):
    for name in ("set-train-0000", "set-train-0001", "set-val-0000"):
        tar(tmp_path / "set" / f"{name}.tar", labelled(range(2)))
    with pytest.raises(BadInput, match=r"several splits: train, val\. .*such as set-train-\*\.tar"):
        read(tmp_path / "set")
    kind, samples, _ = read(tmp_path / "set", "set-train-*.tar")
    assert (kind, len(samples)) == ("webdataset", 4)
    # A folder above, the pattern is compared with the last parts of the paths.
    assert len(read(tmp_path, "set/set-val-*.tar")[1]) == 2
    for name in ("train", "test"):
        tar(tmp_path / "class" / f"{name}.tar", [(f"{name}.jpg", b"x")])
    with pytest.raises(BadInput, match=r"holds the splits test, train .*such as .*/test\.tar"):
        read(tmp_path / "class")


def test_tars_of_two_kinds_are_told(tmp_path):
    tar(tmp_path / "set" / "a.tar", labelled(range(2)))
    tar(tmp_path / "set" / "b.tar", [("b_0.jpg", b"x")])
    with pytest.raises(BadInput, match=r"a\.tar like webdataset, b\.tar like tars"):
        read(tmp_path / "set")


def test_a_tar_that_git_has_not_fetched_is_told(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" + bytes(90))
    with pytest.raises(BadInput, match=r"a\.tar is a Git LFS pointer.*`git lfs pull`"):
        list_units(Source("webdataset", locate(str(tmp_path))))


def test_a_shard_that_changed_since_it_was_listed_is_told(tmp_path):
    folder = tar(tmp_path / "set" / "a.tar", labelled(range(3)))
    source = Source("webdataset", locate(str(folder)))
    (unit,), _ = list_units(source)
    other = [*labelled(range(2)), ("0002.txt", b"2"), ("0003.txt", json.dumps(1).encode())]
    tar(folder / "a.tar", other)
    with pytest.raises(BadInput, match=r"a\.tar"):
        list(read_unit(source, unit))
