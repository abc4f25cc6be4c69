"""The shard index: read back as written, compared with the shards and with the model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cat_ray.data.index import INDEX_NAME, Index, Shard, check_fits, check_shards, read_index
from cat_ray.errors import BadInput
from cat_ray.storage import Location, locate

SHARDS = tuple(Shard(f"train-{n}.tar", 10 + n, 100 + n, f"{n:064x}") for n in range(3))
INDEX = Index(resolution=32, channels=3, class_counts=(20, 0, 13, 0), source="tests", shards=SHARDS)


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    """Files of the sizes that the index tells, and the index."""
    place = locate(str(tmp_path))
    for shard in SHARDS:
        (place / shard.name).write(b"x" * shard.bytes)
    (place / INDEX_NAME).write(INDEX.to_json())
    return place


def test_an_index_is_read_as_it_was_written(folder):
    assert read_index(folder) == INDEX
    assert INDEX.images == 10 + 11 + 12


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
        INDEX.to_json().replace(b'"format": 1', b'"format": 2'),
        INDEX.to_json().replace(b'"count"', b'"cuont"'),
        INDEX.to_json().replace(b'"resolution"', b'"resolutoin"'),
        json.dumps({"format": 1, "class_counts": 3, "shards": [3]}).encode(),
        b"null",
        b"3",
        b'"text"',
    ],
)
def test_what_is_no_index_is_refused_by_name(folder, content):
    (folder / INDEX_NAME).write(content)
    with pytest.raises(BadInput, match=r"index\.json is not a shard index"):
        read_index(folder)


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
        (64, 3, 10, "3 x 32 x 32 images, model.channels and model.resolution say 3 and 64"),
        (32, 1, 10, "3 x 32 x 32 images, model.channels and model.resolution say 1 and 32"),
        (32, 3, 2, "class id 2, outside data.num_classes 2: set it to at least 3"),
    ],
)
def test_shards_that_do_not_fit_the_model_are_refused(resolution, channels, num_classes, told):
    with pytest.raises(BadInput) as caught:
        check_fits(INDEX, resolution, channels, num_classes)
    assert told in str(caught.value)
