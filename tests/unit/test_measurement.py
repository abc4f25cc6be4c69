"""What a distance is called, what its job must say, and when two may be compared."""

import json
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cat_ray.config import load, parse
from cat_ray.errors import BadInput
from cat_ray.evaluation.copies import Copies, pixels_place
from cat_ray.evaluation.features import Featuriser
from cat_ray.evaluation.image_sources import FromShards
from cat_ray.evaluation.inception_score import SPLIT_IMAGES
from cat_ray.evaluation.measurement import Measurement, Workers
from cat_ray.evaluation.ranges import (
    RANGE_IMAGES,
    STATISTICS,
    RangeStore,
    digest_of,
    folder_of_ranges,
)
from cat_ray.evaluation.result import Result, differences, metric_name, read_result
from cat_ray.evaluation.workers import begin_work
from cat_ray.storage import Location, locate

JOB = """
samples: {checkpoint: runs/a}
features: {network: pixels}
reference: shards
output: {folder: out}
"""
PIXELS = Featuriser("pixels")


@pytest.mark.parametrize(
    ("network", "reference", "count", "name"),
    [
        ("inception", "adm", 50_000, "fid50k_adm"),
        ("inception", "adm", 5_000, "fid5k_adm"),
        ("inception", "adm", 49_999, "fid49999_adm"),
        ("inception", "shards", 50_000, "fid50k_shards"),
        ("pixels", "shards", 50_000, "pixels50k_shards"),
        ("dinov2", "shards", 50_000, "fd_dinov2_50k_shards"),
    ],
)
def test_a_distance_is_called_what_it_is(network, reference, count, name):
    assert metric_name(network, reference, count) == name


def test_the_offline_job_is_valid_and_measures_50000_samples():
    found = load(str(Path(__file__).parents[2] / "jobs" / "fid.yaml"), kind=Measurement)
    assert (found.samples.count, found.features.network) == (50_000, "pixels")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("features.network=inception", "needs weights and their sha256"),
        ("features={network: inception, weights: w}", "needs weights and their sha256"),
        ("features={network: dinov2, weights: w}", "dinov2 needs weights and their sha256"),
        ("samples.count=3", "greater than 3"),
        ("samples.labels=random", "'uniform' or 'balanced'"),
        ("samples.truncation=1.5", "less than or equal to 1"),
        ("samples.cuont=5", "did you mean samples.count?"),
    ],
)
def test_a_bad_job_is_refused(change, told):
    with pytest.raises(BadInput, match=told):
        parse(JOB, "fid.yaml", [change], Measurement)


# Two results.


RESULT = Result(
    metric="fid50k_adm",
    figures={"frechet": 2.0},
    protocol={"samples": 50_000, "labels": "uniform", "vae": None},
    subject={"checkpoint": "a"},
    pixels_sha256="",
    made_with={},
    images_per_second={},
    seconds={},
)


def test_other_subjects_are_comparable():
    other = replace(RESULT, subject={"checkpoint": "b"}, figures={"frechet": 1.0})
    assert list(differences(RESULT, other)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": "balanced"}, ["labels: uniform, balanced"]),
        ({"vae": "ema", "samples": 5}, ["samples: 50000, 5", "vae: None, ema"]),
        ({"new": 1}, ["new: None, 1"]),
    ],
)
def test_another_protocol_is_told_key_by_key(changes, expected):
    other = replace(RESULT, protocol={**RESULT.protocol, **changes})
    assert list(differences(RESULT, other)) == expected


def test_another_metric_is_never_comparable():
    assert list(differences(RESULT, replace(RESULT, metric="fid5k_adm"))) == [
        "metric: fid50k_adm, fid5k_adm"
    ]


WRONG = json.dumps({**asdict(RESULT), "figures": [3]}).encode()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"metric": "fid50k_adm"}', b"[" * 100_000, WRONG]
)
def test_another_file_is_no_result(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"r\.json is no result"):
        read_result(locate(str(tmp_path / "r.json")))


# Ranges.


class Nothing(FromShards):
    """A source that is never loaded."""

    def __init__(self):
        pass


class Known(Nothing):
    """One that is known by something."""

    def identity(self):
        return {"seed": 0}


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 50_000])
def test_ranges_cover_all_images_once_and_splits_are_whole_ranges(tmp_path, count):
    store = RangeStore(locate(str(tmp_path)), Nothing(), PIXELS, count)
    ranges = store.ranges()
    assert [number for numbers in ranges for number in numbers] == list(range(count))
    assert len({store.place(numbers).name for numbers in ranges}) == len(ranges)
    assert SPLIT_IMAGES % RANGE_IMAGES == 0


def test_only_what_is_not_there_is_due(tmp_path):
    store = RangeStore(locate(str(tmp_path)), Nothing(), PIXELS, 3500)
    for number in (1, 3):
        store.place(store.ranges()[number]).write(b"x")
    assert store.due() == [range(0, 1000), range(2000, 3000)]


def test_with_statistics_only_the_ranges_of_neighbours_are_due(tmp_path):
    store = RangeStore(locate(str(tmp_path)), Nothing(), PIXELS, 12_000)
    (store.folder / STATISTICS).write(b"x")
    store.place(store.ranges()[3]).write(b"x")
    assert store.due() == [numbers for numbers in store.ranges()[:10] if numbers.start != 3000]


def test_what_lacks_a_copy_that_is_wanted_is_due(tmp_path):
    place = locate(str(tmp_path))
    copies = Copies(pixels=100, png=place / "png", shards=place / "shards")
    store = RangeStore(place / "ranges", Nothing(), PIXELS, 2500, copies)
    for numbers in store.ranges():
        store.place(numbers).write(b"x")
        for copy in copies.places(store.folder, numbers):
            copy.write(b"x")
    assert store.due() == []
    (place / "png" / "001999.png").delete()
    (place / "shards" / "samples-000002000.tar").delete()
    pixels_place(store.folder, store.ranges()[0]).delete()
    assert store.due() == store.ranges()
    assert len(copies.places(store.folder, store.ranges()[1])) == 2, "pixels of few are wanted"


def test_the_name_of_a_store_follows_from_all_but_where_the_weights_lie():
    inception = Featuriser("inception", "a", "1")
    name = digest_of({"seed": 0}, inception, 10)
    assert digest_of({"seed": 0}, Featuriser("inception", "b", "1"), 10) == name
    others = [
        digest_of({"seed": 1}, inception, 10),
        digest_of({"seed": 0}, Featuriser("inception", "a", "2"), 10),
        digest_of({"seed": 0}, PIXELS, 10),
        digest_of({"seed": 0}, inception, 11),
    ]
    assert len({name, *others}) == 5


MACHINES = [
    Workers(count=3, gpu=gpu, cpus_per_worker=threads, spare=threads == 2)
    for gpu in (False, True)
    for threads in (1, 2, 8)
]


def test_what_rounds_otherwise_has_another_name_and_more_workers_have_the_same():
    names = {digest_of({"seed": 0}, PIXELS, 10, workers) for workers in MACHINES}
    assert len(names) == len(MACHINES)
    for workers in MACHINES:
        for change in ({"count": 64}, {"spare": not workers.spare}):
            other = workers.model_copy(update=change)
            assert digest_of({"seed": 0}, PIXELS, 10, other) == digest_of(
                {"seed": 0}, PIXELS, 10, workers
            )


def test_ranges_of_a_cpu_begun_before_devices_were_told_apart_are_still_known():
    # As e108eef named them.
    assert digest_of({"seed": 0}, PIXELS, 10, Workers(count=4)) == "60691ecb20f75a0e"


def test_ranges_that_may_be_of_another_device_are_made_anew_and_that_is_told(tmp_path, caplog):
    parent = locate(str(tmp_path))

    def folder(workers: Workers) -> Location:
        return folder_of_ranges(parent, "features", Known(), PIXELS, 10, workers)

    assert folder(MACHINES[0]) != folder(MACHINES[-1]) and not caplog.text
    (folder(MACHINES[0]) / "images.safetensors").write(b"x")
    assert folder(MACHINES[0]).sizes() and not caplog.text
    made = folder(MACHINES[-1])
    assert f"{folder(MACHINES[0]).uri} was made on one thread of a CPU, or by an" in caplog.text
    assert f"made anew in {made.uri}" in caplog.text and not made.sizes()
    caplog.clear()
    (made / "images.safetensors").write(b"x")
    assert folder(MACHINES[-1]) == made and not caplog.text


@pytest.mark.parametrize(("spare", "policy"), [(True, os.SCHED_IDLE), (False, os.SCHED_OTHER)])
def test_what_takes_only_spare_cores_gives_way_to_everybody(spare, policy):
    found = []

    def work() -> None:
        begin_work(Workers(spare=spare))
        found.append(os.sched_getscheduler(0))

    # A policy is a thread's own.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [policy]
