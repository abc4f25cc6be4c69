"""The cache of what was read: what it gives is whole, and it keeps to its bounds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.data import cache as module
from cat_ray.data.cache import CHECKSUM_BYTES, SWEEP_EVERY_BYTES, Cache

PART = 1000
some = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"), 20 * PART)


def content(number: int) -> bytes:
    # With its checksum a part takes just as much room as its share.
    return bytes([number % 256]) * (PART - CHECKSUM_BYTES)


def files(cache: Cache) -> list[Path]:
    return [path for path in Path(cache.folder).rglob("*") if path.is_file()]


def held(cache: Cache) -> int:
    return sum(path.stat().st_size for path in files(cache))


def file_of(cache: Cache, key: str) -> Path:
    """The one file that comes with a key."""
    before = set(files(cache))
    cache.put(key, b"content")
    (path,) = set(files(cache)) - before
    return path


def age(cache: Cache, key: str, seconds: int) -> None:
    """Lets a part have been used so long ago; the clock is too coarse to wait for."""
    path = cache._path(key)
    os.utime(path, (10**9 - seconds, 10**9 - seconds))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 5000])
def test_what_was_put_is_found_under_its_key_and_no_other(cache, size):
    cache.put("shard 0 10", b"x" * size)
    assert cache.get("shard 0 10") == b"x" * size
    assert cache.get("shard 0 11") is None


def test_nothing_is_found_before_anything_was_put(cache):
    assert cache.get("anything") is None
    assert not Path(cache.folder).exists()


def test_the_later_of_two_under_a_key_counts(cache):
    cache.put("key", b"old")
    cache.put("key", b"newer")
    assert cache.get("key") == b"newer"
    assert len(files(cache)) == 1


def test_any_key_is_a_good_one(cache):
    keys = ["s3://bucket/a b/ü.tar 0 1", "", "../../etc/passwd", "k" * 5000, "a\nb"]
    for number, key in enumerate(keys):
        cache.put(key, content(number))
    assert [cache.get(key) for key in keys] == [content(n) for n in range(len(keys))]
    root = Path(cache.folder)
    assert all(path.relative_to(root).parent.name for path in files(cache))


@pytest.mark.parametrize(
    "damage", ["cut short", "empty", "a flipped bit", "longer", "no checksum", "only a checksum"]
)
def test_a_part_that_is_damaged_is_as_good_as_none_and_can_be_put_again(cache, damage):
    path = file_of(cache, "key")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut short": whole[:-1],
            "empty": b"",
            "a flipped bit": bytes([whole[0] ^ 1]) + whole[1:],
            "longer": whole + b"x",
            "no checksum": whole[:-CHECKSUM_BYTES],
            "only a checksum": whole[-CHECKSUM_BYTES:],
        }[damage]
    )
    assert cache.get("key") is None
    cache.put("key", b"content")
    assert cache.get("key") == b"content"


def test_a_put_that_is_killed_leaves_no_part(cache, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        cache.put("key", b"content")
    assert cache.get("key") is None


def test_what_another_process_put_is_found(cache, tmp_path):
    code = f"from cat_ray.data.cache import Cache; Cache({cache.folder!r}, 9999).put('key', b'x')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert cache.get("key") == b"x"


# Bounds.


@some
@given(st.lists(st.integers(0, 12_000), max_size=40))
def test_no_more_is_held_than_the_bound_and_a_few_hundredths(tmp_path_factory, sizes):
    cache = Cache(str(tmp_path_factory.mktemp("cache")), 20 * PART)
    for number, size in enumerate(sizes):
        cache.put(str(number), b"x" * size)
        slack = SWEEP_EVERY_BYTES * cache.max_bytes + CHECKSUM_BYTES * len(sizes)
        assert held(cache) <= cache.max_bytes + slack


def test_as_long_as_there_is_room_nothing_goes(cache):
    for number in range(20):
        cache.put(str(number), content(number))
    assert [cache.get(str(n)) for n in range(20)] == [content(n) for n in range(20)]


def test_those_that_were_used_longest_ago_go_first(cache):
    for number in range(20):
        cache.put(str(number), content(number))
        age(cache, str(number), 1000 - number)
    # The two oldest are used once more.
    assert cache.get("0") and cache.get("1")
    cache.put("20", content(20))
    left = {n for n in range(21) if cache._path(str(n)).exists()}
    assert {0, 1, 20} <= left
    gone = set(range(21)) - left
    assert gone == set(range(2, 2 + len(gone)))
    assert held(cache) <= cache.max_bytes


def test_what_is_kept_is_still_whole_after_others_went(cache):
    for number in range(100):
        cache.put(str(number), content(number))
        age(cache, str(number), 1000 - number)
    found = {n: cache.get(str(n)) for n in range(100)}
    kept = [n for n, part in found.items() if part is not None]
    assert kept and kept == list(range(kept[0], 100))
    assert all(found[n] == content(n) for n in kept)


def test_a_new_process_looks_at_what_an_older_one_left(cache, monkeypatch):
    big = Cache(cache.folder, 1000 * PART)
    for number in range(50):
        big.put(str(number), content(number))
    # As it is in a process that has just begun.
    monkeypatch.setattr(module, "_put_since_sweep", {})
    cache.put("one more", b"x")
    assert held(cache) <= cache.max_bytes


def test_a_part_that_another_process_sweeps_meanwhile_is_no_error(cache, monkeypatch):
    monkeypatch.setattr(module, "_put_since_sweep", {})
    for number in range(20):
        cache.put(str(number), content(number))
    stat = Path.stat

    def swept(path: Path, **options: bool) -> os.stat_result:
        if path.parent.parent == Path(cache.folder):
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", swept)
    monkeypatch.setattr(module, "_put_since_sweep", {})
    cache.put("more", content(1))


def test_what_else_lies_in_the_folder_is_never_deleted(tmp_path):
    own = tmp_path / "ab" / "my thesis.tex"
    own.parent.mkdir()
    own.write_bytes(b"x" * 1000)
    (tmp_path / "cd").mkdir()
    copy = tmp_path / "cd" / ("a" * 64)
    copy.write_bytes(b"x" * 1000)
    cache = Cache(str(tmp_path), 100)
    for number in range(20):
        cache.put(f"key {number}", b"y" * 50)
    assert own.exists()
    assert copy.exists()
