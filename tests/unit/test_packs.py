"""Packs: many latents in one tar member, read back as they were put in."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
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
        # Shapes that are not those of the names, and one of more bytes than there are.
        (LATENTS, pack(2).members()[LATENTS]),
        (CLASSES, pack(2).members()[CLASSES]),
        (CLASSES, pack().members()[LATENTS]),
        (KEYS, b'"abc"'),
        (KEYS, b"[1, 2, 3]"),
        (KEYS, b"[" * 100_000),
        (TOKENS, pack().members()[LATENTS]),
        (LATENTS, pack().members()[LATENTS].replace(b"(3, 8, 4, 4)", b"(9999999999)")),
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


VALID = pack(tokens=True).members()
changed_bytes = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4)
damaged = st.tuples(st.sampled_from(sorted(VALID)), changed_bytes)


def check_damaged(name: str, changes: list[tuple[int, int]]) -> None:
    content = bytearray(VALID[name])
    for place, value in changes:
        # Most of them in the header, the rest of an array is numbers.
        content[place % min(len(content), 200)] = value
    try:
        found = unpack(RawSample("p", {**VALID, name: bytes(content)}), "0.tar")
    except BadInput as error:
        assert "shard 0.tar: p is no pack of latents" in str(error)
    else:
        assert len(found.latents) == len(found.classes) == len(found.keys) == 3


@settings(max_examples=200, deadline=None)
@given(damaged)
@example((CLASSES, [(10, 0)]))
def test_whatever_is_changed_in_a_pack_only_our_own_errors_come_out(case):
    check_damaged(*case)


@pytest.mark.long
@settings(max_examples=10_000, deadline=None)
@given(damaged)
def test_whatever_is_changed_in_ten_thousand_packs_only_our_own_errors_come_out(case):
    check_damaged(*case)
