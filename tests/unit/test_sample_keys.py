"""The proof of "each image once": what went into a run's state, whatever was lost on the way."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from cat_ray.data.order import Stream, pieces
from cat_ray.operations.sample_keys import (
    SAMPLES,
    SampleKeys,
    Trained,
    repeated,
    trained_on,
)
from cat_ray.storage import Location, locate
from cat_ray.training.lanes import share

some = settings(max_examples=60, deadline=None, derandomize=True)

# Two lanes of two images each.
BATCH, LANES = 4, 2
CUT = b'{"images": 8, "lan'


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


@pytest.fixture
def remote(tmp_path: Path) -> Location:
    """A run on a filesystem that isn't this machine's, as an object store is."""
    (tmp_path / "run" / SAMPLES).mkdir(parents=True)
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    return Location(store, "run", "s3://bucket/run")


def names(images: int, lanes: range) -> list[str]:
    """The samples of the lanes in the step after so many images."""
    return [f"{images}-{lane}{letter}" for lane in lanes for letter in "ab"]


def noise(images: int, lanes: range, size: int = 2) -> np.ndarray:
    rows = [[images + lane / 8 + place / 64] * 3 for lane in lanes for place in range(size)]
    return np.asarray(rows, dtype=np.float32)


def step(record: SampleKeys, images: int, lanes: range = range(LANES)) -> None:
    record.add(images, lanes, np.asarray(names(images, lanes)), noise(images, lanes))


def steps(run: Location, group: str, rank: int, lanes: range, places: range) -> Location:
    """A worker takes the steps at these places and ends in good order; where its rows are."""
    record = SampleKeys(run, group, rank)
    for images in places:
        step(record, images, lanes)
    return run / SAMPLES / f"{group}-{rank:04d}.jsonl"


def undisturbed(images: int) -> tuple[str, ...]:
    return tuple(name for start in range(0, images, BATCH) for name in names(start, range(LANES)))


# Any plan, any disturbance.


@st.composite
def streams(draw) -> Stream:
    counts = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any))
    lanes, lane_size = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    block = draw(st.integers(1, 9))
    return Stream(draw(st.integers(0, 9)), tuple(counts), block, lanes * lane_size, lanes)


def planned(stream: Stream, lanes: range, start: int, stop: int) -> list[np.ndarray]:
    """A worker's keys in each step, lane after lane, from the pieces that it is to read."""
    by_lane: dict[int, list[str]] = {lane: [] for lane in lanes}
    for piece in pieces(stream, lanes, start, stop):
        by_lane[piece.lane] += [f"{piece.shard}/{member}" for member in piece.members]
    size = stream.lane_size
    return [
        np.asarray([k for keys in by_lane.values() for k in keys[at * size : (at + 1) * size]])
        for at in range((stop - start) // stream.batch_size)
    ]


def train(stream: Stream, run: Location, group: str, start: int, stops: list[int]) -> None:
    """Each worker of a group trains from one place to where it ends itself, all in images."""
    for rank, stop in enumerate(stops):
        lanes = share(stream.lanes, len(stops), rank)
        record = SampleKeys(run, group, rank)
        for place, keys in enumerate(planned(stream, lanes, start, stop)):
            images = start + place * stream.batch_size
            record.add(images, lanes, keys, noise(images, lanes, stream.lane_size))


@some
@given(st.data())
def test_kills_and_restarts_change_nothing_in_what_a_run_is_trained_on(data):
    stream = data.draw(streams())
    batch, total = stream.batch_size, data.draw(st.integers(1, 10))
    sizes = st.integers(1, stream.lanes)
    starts: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        run, start = locate(f"{folder}/run"), 0
        for number in range(data.draw(st.integers(0, 4))):
            # Names don't tell which group came first.
            group = data.draw(st.text("abcdef", min_size=5, max_size=5)) + str(number)
            starts.append((group, start * batch))
            world_size, killed = data.draw(sizes), data.draw(st.integers(start, total))
            # When a group is killed some of its workers are a step ahead, or within a line.
            ahead = [data.draw(st.integers(0, 1)) for _ in range(world_size)]
            stops = [min(killed + more, total) * batch for more in ahead]
            train(stream, run, group, start * batch, stops)
            rank = data.draw(st.integers(0, world_size))
            path = Path(f"{folder}/run/{SAMPLES}/{group}-{rank:04d}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(CUT)
            # The newest sound checkpoint: after any step that is done.
            start = data.draw(st.integers(0, killed))
        starts.append(("last", start * batch))
        train(stream, run, "last", start * batch, [total * batch] * data.draw(sizes))
        alone = locate(f"{folder}/alone")
        train(stream, alone, "a", 0, [total * batch])

        found = trained_on(run, starts)
        assert found == trained_on(alone, [("a", 0)])
    keys = planned(stream, range(stream.lanes), 0, total * batch)
    assert found.keys == tuple(key for each in keys for key in each)
    if stream.lanes == 1:
        # A single lane goes through one epoch after another.
        assert repeated(found, stream.epoch_images) == []


# What counts.


def test_keys_come_lane_after_lane_step_after_step_whoever_wrote_them_and_when(run):
    steps(run, "a", 0, range(1, 2), range(8, -1, -BATCH))
    steps(run, "a", 1, range(1), range(0, 12, BATCH))
    assert trained_on(run, [("a", 0)]).keys == undisturbed(12)


def test_work_that_was_done_again_counts_once_as_the_later_group_did_it(run):
    steps(run, "b", 0, range(LANES), range(0, 16, BATCH))
    record = SampleKeys(run, "a", 0)
    other = np.asarray(["w", "x", "y", "z"])
    record.add(8, range(LANES), other, noise(8, range(LANES)))
    assert trained_on(run, [("b", 0), ("a", 8)]).keys == (*undisturbed(8), *other)


def test_a_group_whose_name_begins_as_anothers_is_another(run):
    steps(run, "a", 0, range(LANES), range(0, 8, BATCH))
    steps(run, "ab", 0, range(LANES), range(0, 8, BATCH))
    assert trained_on(run, [("a", 0)]).keys == undisturbed(8)


def test_before_the_first_step_a_run_was_trained_on_nothing(run):
    assert trained_on(run, []).keys == trained_on(run, [("a", 0)]).keys == ()


def test_the_noise_of_each_lane_and_step_is_part_of_the_proof(run):
    def hashed(group: str, at: int, lane: int, change: float) -> str:
        record = SampleKeys(run, group, 0)
        for images in range(0, 12, BATCH):
            drawn = noise(images, range(LANES))
            if images == at:
                drawn[2 * lane + 1, 2] += change
            record.add(images, range(LANES), np.asarray(names(images, range(LANES))), drawn)
        return trained_on(run, [(group, 0)]).noise

    cases = [(at, lane, change) for at in (0, 8) for lane in range(LANES) for change in (1, 1e-5)]
    hashes = [hashed(f"{n}x", *case) for n, case in enumerate([(0, 0, 0.0), (8, 1, 0.0), *cases])]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[1:])) == len(cases) + 1


# What is missing or there twice.


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        ([(0, range(2)), (4, range(1)), (8, range(2))], 4),
        ([(0, range(2)), (4, range(1, 2)), (8, range(2))], 4),
        ([(0, range(2)), (8, range(2))], 4),
        ([(4, range(2)), (8, range(2))], 0),
        ([(0, range(1, 2))], 0),
    ],
)
def test_a_missing_lane_is_an_error_with_its_place(run, rows, place):
    record = SampleKeys(run, "a", 0)
    for images, lanes in rows:
        step(record, images, lanes)
    with pytest.raises(ValueError, match=f"samples are missing at {place} images"):
        trained_on(run, [("a", 0)])


@pytest.mark.parametrize("images", [0, 4, 8])
def test_a_lane_that_a_dead_worker_did_not_get_to_is_missed(run, images):
    steps(run, "a", 0, range(1), range(0, 12, BATCH))
    steps(run, "a", 1, range(1, 2), range(0, images, BATCH))
    steps(run, "b", 0, range(LANES), range(12, 16, BATCH))
    with pytest.raises(ValueError, match="samples are missing"):
        trained_on(run, [("a", 0), ("b", 12)])


@pytest.mark.parametrize(("images", "lane"), [(0, 0), (4, 1)])
def test_a_lane_that_two_workers_did_is_an_error_with_its_place(run, images, lane):
    steps(run, "a", 0, range(LANES), range(0, 8, BATCH))
    step(SampleKeys(run, "a", 1), images, range(lane, lane + 1))
    with pytest.raises(ValueError, match=f"lane {lane} at {images} images was done twice"):
        trained_on(run, [("a", 0)])


def test_a_step_that_two_groups_did_is_an_error_where_the_second_did_not_begin_there(run):
    steps(run, "a", 0, range(LANES), range(0, 12, BATCH))
    steps(run, "b", 0, range(LANES), range(8, 16, BATCH))
    assert trained_on(run, [("a", 0), ("b", 8)]).keys == undisturbed(16)
    with pytest.raises(ValueError, match="lane 0 at 8 images was done twice"):
        trained_on(run, [("a", 0), ("b", 12)])


def test_wherever_a_kill_cuts_the_last_line_those_before_it_stand(run):
    place = steps(run, "a", 0, range(LANES), range(0, 12, BATCH))
    content = place.read()
    last = content.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(content)):
        place.write(content[:end])
        assert trained_on(run, [("a", 0)]).keys == undisturbed(8)
    place.write(content)
    assert trained_on(run, [("a", 0)]).keys == undisturbed(12)


def test_a_step_is_written_down_when_it_is_told(run):
    record = SampleKeys(run, "a", 0)
    for images in range(0, 12, BATCH):
        step(record, images)
        assert trained_on(run, [("a", 0)]).keys == undisturbed(images + BATCH)


# On an object store.


def test_on_an_object_store_each_row_arrives_with_its_step(remote):
    record = SampleKeys(remote, "a", 0)
    for images in range(0, 12, BATCH):
        step(record, images)
        assert trained_on(remote, [("a", 0)]).keys == undisturbed(images + BATCH)


def test_a_worker_without_a_step_leaves_no_row(run, remote):
    for place in (run, remote):
        SampleKeys(place, "a", 0)
        assert (place / SAMPLES).sizes() == {}


def test_a_last_step_without_its_last_lane_is_no_whole_one(run):
    record = SampleKeys(run, "a", 0)
    step(record, 0)
    step(record, BATCH, range(LANES - 1))
    with pytest.raises(ValueError, match="samples are missing"):
        trained_on(run, [("a", 0)])


def test_the_rows_are_json_with_a_hash_and_the_keys_of_each_lane(run):
    place = steps(run, "a", 3, range(1, 3), range(4, 5))
    row = json.loads(place.read())
    assert row["images"] == 4
    assert {lane: entry[1:] for lane, entry in row["lanes"].items()} == {
        "1": names(4, range(1, 2)),
        "2": names(4, range(2, 3)),
    }


# Repetitions.


@pytest.mark.parametrize(
    ("keys", "twice"),
    [
        ("", ""),
        ("abcdef", ""),
        ("abccab", ""),
        ("abca", ""),
        ("abcabb", "b"),
        ("aabbcc", "ac"),
        ("abcddd", "d"),
        ("aba", "a"),
    ],
)
def test_a_sample_is_repeated_if_it_comes_twice_in_an_epoch(keys, twice):
    assert repeated(Trained(tuple(keys), ""), epoch_images=3) == list(twice)
