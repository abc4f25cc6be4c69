"""Packs: many latents in one tar member, read back as they were put in."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.data.packs import CLASSES, KEYS, LATENTS, TOKENS, Pack, unpack
from cat_ray.data.shard_file import Entry, write_shard_file
from cat_ray.data.tar import RawSample, samples
from cat_ray.errors import BadInput
from cat_ray.storage import locate

some = settings(max_examples=40, deadline=None, derandomize=True)


def pack(count: int = 3, side: int = 4, tokens: bool = False) -> Pack:
    random = np.random.default_rng(count)
    return Pack(
        random.normal(size=(count, 8, side, side)).astype(np.float16),
        random.integers(0, 1000, count),
        [f"cats/{place}" for place in range(count)],
        random.normal(size=(count, 5, 6)).astype(np.float16) if tokens else None,
    )


def assert_same(found: Pack, expected: Pack) -> None:
    assert np.array_equal(found.latents, expected.latents)
    assert found.latents.dtype == expected.latents.dtype
    assert np.array_equal(found.classes, expected.classes)
    assert list(found.keys) == list(expected.keys)
    if expected.tokens is None:
        assert found.tokens is None
    else:
        assert found.tokens is not None
        assert np.array_equal(found.tokens, expected.tokens)


@some
@given(st.integers(1, 70), st.sampled_from([4, 32]), st.booleans())
def test_a_pack_is_read_as_it_was_written(count, side, tokens):
    expected = pack(count, side, tokens)
    assert_same(unpack(RawSample("p", expected.members()), "0.tar"), expected)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_pack_goes_through_a_shard_unchanged(tmp_path, tokens):
    place = locate(str(tmp_path))
    packs = [pack(count, tokens=tokens) for count in (3, 3, 2)]
    entries = [Entry(f"p-{n}", p.members(), p.classes.tolist()) for n, p in enumerate(packs)]
    written = write_shard_file(place, "0.tar", entries)
    assert written.shard.count == 8
    raw = list(samples((place / "0.tar").read(), "0.tar"))
    assert [(sample.begin, sample.end) for sample in raw] == list(
        zip(written.extents, written.extents[1:], strict=False)
    )
    for found, expected in zip(raw, packs, strict=True):
        assert_same(unpack(found, "0.tar"), expected)


def test_tokens_are_there_only_where_they_were_asked_for():
    assert pack().members().keys() == {LATENTS, CLASSES, KEYS}
    assert pack(tokens=True).members().keys() == {LATENTS, CLASSES, KEYS, TOKENS}


def pickled() -> bytes:
    return np.array([{"a": 1}], dtype=object).dumps()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (LATENTS, None),
        (CLASSES, None),
        (KEYS, None),
        (LATENTS, b""),
        (LATENTS, b"\x93NUMPY"),
        (LATENTS, pack().members()[LATENTS][:-9]),
        (CLASSES, b"text"),
        # Arrays of objects would run code as they are read.
        (CLASSES, pickled()),
        (KEYS, b"["),
        (KEYS, b"\xff"),
        (TOKENS, b"\x93NUMPY\x01"),
    ],
)
def test_what_is_no_pack_is_refused_by_shard_and_name(name, content):
    members = pack(tokens=True).members()
    if content is None:
        del members[name]
    else:
        members[name] = content
    with pytest.raises(BadInput, match=r"shard seven\.tar: p3 is no pack of latents"):
        unpack(RawSample("p3", members), "seven.tar")


def test_keys_are_plain_text_for_any_reader():
    assert json.loads(pack().members()[KEYS]) == ["cats/0", "cats/1", "cats/2"]
