"""The shard index: read back as written, compared with the shards and with the model."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from cat_ray.data.index import (
    BLOCK_BYTES,
    EXTENTS_NAME,
    FORMAT,
    INDEX_NAME,
    Index,
    Shard,
    check_fits,
    check_shards,
    dense,
    read_extents,
    read_index,
    write_index,
)
from cat_ray.errors import BadInput, Damaged
from cat_ray.storage import Location, locate

SHARDS = tuple(Shard(f"train-{n}.tar", 10 + n, 100 + n, f"{n:064x}") for n in range(3))
INDEX = Index(
    contents="images",
    resolution=32,
    channels=3,
    class_counts=(20, 0, 13, 0),
    source="tests",
    shards=SHARDS,
    extents_sha256="",
)
LATENTS = replace(
    INDEX,
    contents="latents",
    channels=4,
    pack_images=64,
    made_with={"vae": "a-vae", "scaling_factor": 0.25, "tokens": {"name": "dino", "grid": 16}},
)
EXTENTS = {shard.name: np.arange(shard.count + 1) * 9 for shard in SHARDS}


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    """Files of the sizes that the index tells, and the index."""
    place = locate(str(tmp_path))
    for shard in SHARDS:
        (place / shard.name).write(b"x" * shard.bytes)
    (place / INDEX_NAME).write(INDEX.to_json())
    return place


@pytest.mark.parametrize("index", [INDEX, LATENTS, replace(INDEX, resolution=None)])
def test_an_index_is_read_as_it_was_written(folder, index):
    written = write_index(folder, index, EXTENTS)
    assert read_index(folder) == written
    assert written == replace(index, extents_sha256=written.extents_sha256)
    assert written.images == 10 + 11 + 12


def test_extents_are_read_as_they_were_written(folder):
    index = write_index(folder, INDEX, {name: tuple(places) for name, places in EXTENTS.items()})
    found = read_extents(folder, index)
    assert found.keys() == EXTENTS.keys()
    assert all(np.array_equal(found[name], EXTENTS[name]) for name in EXTENTS)
    assert {places.dtype for places in found.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize("damage", ["other", "cut short", "empty"])
def test_extents_that_are_not_those_of_the_index_are_refused_by_name(folder, damage):
    index = write_index(folder, INDEX, EXTENTS)
    content = (folder / EXTENTS_NAME).read()
    if damage == "other":
        write_index(folder, INDEX, {name: places + 1 for name, places in EXTENTS.items()})
    else:
        (folder / EXTENTS_NAME).write(content[:-1] if damage == "cut short" else b"")
    with pytest.raises(BadInput, match=r"extents\.safetensors is not the one of index\.json"):
        read_extents(folder, index)


@pytest.mark.parametrize("name", [EXTENTS_NAME, INDEX_NAME])
def test_an_index_is_written_after_the_extents_that_it_tells_of(tmp_path, monkeypatch, name):
    folder, write = locate(str(tmp_path)), Location.write

    def killed_before(place: Location, content: bytes) -> None:
        if place.name == name:
            raise KeyboardInterrupt
        write(place, content)

    monkeypatch.setattr(Location, "write", killed_before)
    with pytest.raises(KeyboardInterrupt):
        write_index(folder, INDEX, EXTENTS)
    assert not (folder / INDEX_NAME).exists()


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (INDEX, "33 images of 2 classes, 3 x 32 x 32, in 3 shards"),
        (replace(INDEX, resolution=None), "33 images of 2 classes, of various sizes, in 3 shards"),
        (LATENTS, "33 latents of 2 classes, 4 x 32 x 32, in 3 shards"),
    ],
)
def test_an_index_tells_people_what_there_is(index, words):
    assert index.describe() == words


@pytest.mark.parametrize(
    ("count", "size", "pack", "expected"),
    [
        (1024, BLOCK_BYTES, 1, 1024),
        (1000, 1000 * 110_000, 1, 10),
        # A sample that is larger than a block is a block.
        (10, 10 * 5 * BLOCK_BYTES, 1, 1),
        (1000, 1000 * 8192, 64, 128),
        (1000, 1000 * 16_500, 64, 64),
        (1000, 1000 * 100_000, 64, 64),
        (0, 0, 1, BLOCK_BYTES),
    ],
)
def test_a_block_is_about_a_mebibyte_in_whole_packs(count, size, pack, expected):
    shards = (Shard("0.tar", count, size, ""),)
    assert replace(INDEX, shards=shards, pack_images=pack).block_images() == expected


def test_the_digest_changes_with_what_the_samples_are_and_with_nothing_else():
    other = [replace(INDEX, source="elsewhere"), replace(INDEX, extents_sha256="0")]
    assert {index.digest() for index in other} == {INDEX.digest()}
    changes = ({"name": "a.tar"}, {"count": 3}, {"sha256": "f"})
    changed = [replace(INDEX, shards=(replace(SHARDS[0], **c), *SHARDS[1:])) for c in changes]
    changed += [replace(INDEX, shards=SHARDS[::-1]), INDEX]
    assert len({index.digest() for index in changed}) == 5


def test_where_there_is_no_index_the_command_that_makes_one_is_told(tmp_path):
    with pytest.raises(BadInput, match=r"has no index\.json: make the shards with `cat-ray"):
        read_index(locate(str(tmp_path)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        INDEX.to_json()[:-9],
        INDEX.to_json().replace(b'"format": 2', b'"format": 1'),
        INDEX.to_json().replace(b'"format": 2', b'"format": 3'),
        INDEX.to_json().replace(b'"count"', b'"cuont"'),
        INDEX.to_json().replace(b'"resolution"', b'"resolutoin"'),
        json.dumps({"format": FORMAT, "class_counts": 3, "shards": [3]}).encode(),
        b"null",
        b"3",
        b'"text"',
    ],
)
def test_what_is_no_index_is_refused_by_name(folder, content):
    (folder / INDEX_NAME).write(content)
    with pytest.raises(BadInput, match=r"index\.json is not a shard index"):
        read_index(folder)


SHARD = {"name": "0.tar", "count": 5, "bytes": 5120, "sha256": ""}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shards": [{**SHARD, "count": "500"}]}, "shards.0.count: "),
        ({"shards": [{**SHARD, "count": -1}]}, "shards.0.count: "),
        ({"shards": [{**SHARD, "count": True}]}, "shards.0.count: "),
        ({"shards": [{**SHARD, "count": 5.0}]}, "shards.0.count: "),
        ({"shards": [{**SHARD, "count": 10**30}]}, "shards.0.count: "),
        ({"shards": [{**SHARD, "count": 10**9}]}, "can't hold 1,000,000,000 samples in 5,120"),
        ({"shards": [{**SHARD, "bytes": None}]}, "shards.0.bytes: "),
        ({"shards": [{**SHARD, "more": 1}]}, "shards.0.more: "),
        ({"shards": [SHARD, SHARD]}, "'0.tar' is no file of its own"),
        ({"shards": [{**SHARD, "name": "../0.tar"}]}, "'../0.tar' is no file of its own"),
        ({"shards": [{**SHARD, "name": ""}]}, "'' is no file of its own"),
        ({"shards": "0.tar"}, "shards: "),
        ({"shards": None}, "shards: "),
        ({"class_counts": [1, -1]}, "class_counts.1: "),
        ({"class_counts": {"0": 1}}, "class_counts: "),
        ({"contents": "sounds"}, "contents: "),
        ({"resolution": "32"}, "resolution: "),
        ({"resolution": 0}, "resolution: "),
        ({"channels": None}, "channels: "),
        ({"pack_images": 0}, "pack_images: "),
        ({"made_with": []}, "made_with: "),
        ({"made_with": {"scaling_factor": "0.18"}}, "scaling_factor: '0.18' is no number"),
        ({"made_with": {"scaling_factor": float("nan")}}, "scaling_factor: nan is no number"),
        ({"format": True}, "format: "),
    ],
)
def test_a_value_of_an_index_that_can_not_be_is_named_in_one_line(folder, change, told):
    values = {**json.loads(INDEX.to_json()), **change}
    (folder / INDEX_NAME).write(json.dumps(values).encode())
    with pytest.raises(
        Damaged, match=r"index\.json is not a shard index: .* Make it anew"
    ) as caught:
        read_index(folder)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[" * 10**5, b'{"a":' * 10**5, b"9" * 10**5, b"\xff\xfe"])
def test_json_that_can_not_be_parsed_is_damage(folder, content):
    (folder / INDEX_NAME).write(content)
    with pytest.raises(Damaged, match="is not a shard index"):
        read_index(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        np.arange(10) * 9,
        np.arange(12) * 9,
        np.arange(11) * 9.0,
        np.arange(11, dtype=np.int32),
        np.zeros(11, np.int64),
        np.arange(11)[::-1].copy(),
        np.arange(11) * 9 - 1,
        np.arange(22).reshape(11, 2),
        None,
    ],
)
def test_extents_that_can_not_be_are_damage_although_the_index_tells_of_them(folder, wrong):
    content = save(
        {**EXTENTS, SHARDS[0].name: wrong} if wrong is not None else {"x": EXTENTS["train-1.tar"]}
    )
    (folder / EXTENTS_NAME).write(content)
    index = replace(INDEX, extents_sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(
        Damaged, match=r"extents\.safetensors doesn't tell where .* train-0\.tar lie"
    ):
        read_extents(folder, index)


@pytest.mark.parametrize(
    "content", [b"", b"x" * 99, b"\xff" * 8 + b"{}", save({"a": np.ones(3)})[:-1]]
)
def test_extents_that_are_no_safetensors_are_damage(folder, content):
    (folder / EXTENTS_NAME).write(content)
    index = replace(INDEX, extents_sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(Damaged, match=r"extents\.safetensors is no safetensors file"):
        read_extents(folder, index)


@pytest.mark.parametrize(
    ("counts", "expected"), [({}, ()), ({0: 3}, (3,)), ({3: 1, 1: 2}, (0, 2, 0, 1))]
)
def test_an_index_counts_every_class_up_to_the_largest(counts, expected):
    assert dense(counts) == expected


@pytest.mark.parametrize("label", [-1, 10**6, 9_999_999_999, 10**30])
def test_a_class_id_that_can_be_none_is_refused_and_not_counted_up_to(label):
    with pytest.raises(BadInput, match=f"class id {label} is not in 0 to 999,999"):
        dense({0: 1, label: 1})


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"source": "elsewhere"}, True),
        ({"shards": SHARDS[::-1]}, False),
        ({"shards": SHARDS[:2]}, False),
        ({"shards": (*SHARDS[:2], replace(SHARDS[2], sha256="f" * 64))}, False),
        ({"shards": (*SHARDS[:2], replace(SHARDS[2], count=1))}, False),
        ({"shards": (*SHARDS[:2], replace(SHARDS[2], name="other.tar"))}, False),
    ],
)
def test_the_digest_is_that_of_the_samples_in_their_order(change, same):
    assert (replace(INDEX, **change).digest() == INDEX.digest()) is same


def test_whole_shards_pass_whatever_else_is_there(folder):
    (folder / "notes.txt").write(b"mine")
    check_shards(INDEX, folder)


def test_every_missing_and_truncated_shard_is_named_and_no_other(folder):
    (Path(folder.path) / SHARDS[0].name).unlink()
    (folder / SHARDS[2].name).write(b"x" * 7)
    with pytest.raises(BadInput) as caught:
        check_shards(INDEX, folder)
    message = str(caught.value)
    assert "train-0.tar is missing" in message
    assert "train-2.tar has 7 bytes, not 102: truncated or replaced" in message
    assert "train-1.tar" not in message


def test_a_shard_that_grew_is_named(folder):
    (folder / SHARDS[1].name).write(b"x" * 1000)
    with pytest.raises(BadInput, match=r"train-1\.tar has 1000 bytes, not 101"):
        check_shards(INDEX, folder)


@pytest.mark.parametrize(("missing", "elided"), [(5, False), (6, True)])
def test_a_long_list_of_missing_shards_is_cut(tmp_path, missing, elided):
    shards = tuple(replace(SHARDS[0], name=f"{n}.tar") for n in range(missing))
    with pytest.raises(BadInput) as caught:
        check_shards(replace(INDEX, shards=shards), locate(str(tmp_path)))
    assert str(caught.value).count("is missing") == 5
    assert ("..." in str(caught.value)) is elided


@pytest.mark.parametrize("num_classes", [3, 4, 1000])
def test_shards_fit_a_model_that_has_their_shape_and_classes(num_classes):
    check_fits(INDEX, resolution=32, channels=3, num_classes=num_classes)


@pytest.mark.parametrize(
    ("resolution", "channels", "num_classes", "told"),
    [
        (64, 3, 10, "3 x 32 x 32 images, model.channels and model.resolution ask for 3 and 64"),
        (32, 1, 10, "3 x 32 x 32 images, model.channels and model.resolution ask for 1 and 32"),
        (32, 3, 2, "class id 2, outside data.num_classes 2: set it to at least 3"),
    ],
)
def test_shards_that_do_not_fit_the_model_are_refused(resolution, channels, num_classes, told):
    with pytest.raises(BadInput) as caught:
        check_fits(INDEX, resolution, channels, num_classes)
    assert told in str(caught.value)


@pytest.mark.parametrize("resolution", [8, 32, 512])
def test_images_of_various_sizes_fit_any_side(resolution):
    various = replace(INDEX, resolution=None)
    check_fits(various, resolution, channels=3, num_classes=3)
    with pytest.raises(BadInput, match="ask for 1"):
        check_fits(various, resolution, channels=1, num_classes=3)


@pytest.mark.parametrize("resolution", [16, 31])
def test_square_images_are_reduced_and_latents_are_not(resolution):
    check_fits(INDEX, resolution, channels=3, num_classes=3)
    with pytest.raises(BadInput, match=f"4 x 32 x 32 latents, .* ask for 4 and {resolution}"):
        check_fits(LATENTS, resolution, channels=4, num_classes=3)
