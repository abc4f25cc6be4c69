"""The windows in which a worker reads what is due: all of it, in order, the first ones small."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_ray.config import parse
from cat_ray.data.index import Index, Shard
from cat_ray.data.order import Stream
from cat_ray.data.read import Reading
from cat_ray.data.stream import FIRST_WINDOW_BATCHES, Due, stream_of, windows_of
from cat_ray.storage import locate

BATCH = 16
some = settings(max_examples=200, deadline=None, derandomize=True)


LANES = range(1)


def due(start: int, stop: int, window: int, batch: int = BATCH, lanes: int = 1) -> Due:
    """What is due between two places, all in batches; a sample is a byte."""
    return Due(
        stream=Stream(seed=0, counts=(1,), block_images=1, batch_size=batch, lanes=lanes),
        start=start * batch,
        stop=stop * batch,
        window_bytes=window * batch,
        checkpoint=None,
        worker_group="3f9a1c",
        began=0.0,
        noise_stream=0,
        gone_nodes=(),
        index=Index("images", 1, 1, (), "", (), ""),
        reading=Reading(locate("nowhere"), "images", 1, 1, crop=False, num_classes=1),
    )


places = st.tuples(st.integers(0, 2000), st.integers(0, 2000)).map(sorted)
windows = st.integers(1, 500)


@some
@given(places, windows, st.integers(1, 512))
def test_windows_cover_what_is_due_without_gap_or_overlap(place, window, batch):
    start, stop = place
    found = list(windows_of(due(start, stop, window, batch), LANES))
    at = start * batch
    for first, beyond in found:
        assert first == at < beyond
        at = beyond
    assert at == stop * batch


@some
@given(places, windows, st.integers(1, 512))
def test_windows_are_whole_batches_and_never_larger_than_asked_for(place, window, batch):
    for first, beyond in windows_of(due(*place, window, batch), LANES):
        assert first % batch == beyond % batch == 0
        assert beyond - first <= window * batch


@some
@given(places, windows)
def test_the_first_windows_are_small_and_grow_until_they_are_as_large_as_asked_for(place, window):
    start, stop = place
    found = windows_of(due(start, stop, window), LANES)
    sizes = [(beyond - first) // BATCH for first, beyond in found]
    if sizes:
        assert sizes[0] == min(FIRST_WINDOW_BATCHES, window, stop - start)
    for size, following in pairwise(sizes[:-1]):
        assert following == min(2 * size, window)


@pytest.mark.parametrize(
    ("start", "stop", "window", "expected"),
    [
        (0, 0, 10, []),
        (7, 7, 10, []),
        (0, 1, 10, [0, 1]),
        (5, 8, 10, [5, 8]),
        (0, 100, 32, [0, 4, 12, 28, 60, 92, 100]),
        (3, 23, 10, [3, 7, 15, 23]),
        (0, 5, 1, [0, 1, 2, 3, 4, 5]),
        (0, 9, 3, [0, 3, 6, 9]),
    ],
)
def test_windows_of_small_runs(start, stop, window, expected):
    found = [(a // BATCH, b // BATCH) for a, b in windows_of(due(start, stop, window), LANES)]
    assert found == list(pairwise(expected))


@pytest.mark.parametrize(
    ("window_bytes", "batch", "lanes", "own", "expected"),
    [
        # The memory is a worker's own: the fewer lanes are its, the more batches it reads at once.
        (64, 16, 16, range(16), 4),
        (64, 16, 16, range(4), 16),
        (64, 16, 16, range(3, 6), 21),
        (100, 16, 16, range(16), 6),
        # Never less than a batch, however large it is.
        (1, 16, 16, range(16), 1),
        (15, 16, 4, range(3), 1),
    ],
)
def test_a_window_is_as_much_memory_as_asked_for_in_whole_batches(
    window_bytes, batch, lanes, own, expected
):
    long = replace(due(0, 1000, 1, batch, lanes), window_bytes=window_bytes)
    assert max(b - a for a, b in windows_of(long, own)) == expected * batch


# What a job asks for.


@pytest.mark.parametrize(
    ("asked", "pack", "expected"),
    [("null", 1, 1024), ("null", 64, 1024), (7, 1, 7), (7, 64, 64), (64, 64, 64), (65, 64, 128)],
)
def test_a_job_reads_blocks_of_whole_packs_of_about_a_mebibyte(tiny_job, asked, pack, expected):
    shards = tuple(Shard(f"{n}.tar", 1000, 1024 * 1000, "") for n in range(2))
    index = Index("images", 32, 1, (2000,), "", shards, "", pack_images=pack)
    config = parse(tiny_job, "job", [f"data.block_images={asked}", "run.seed=3"])
    assert stream_of(config, index) == Stream(3, (1000, 1000), expected, 16, 4)
