"""Training on shards in a real S3 server to which something happens: it goes on, or says why."""

import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cat_ray.data.index import Index, write_index
from cat_ray.data.shard_file import Entry, write_shard_file
from cat_ray.operations.comparison import starts_of
from cat_ray.operations.goodput import read_ledger
from cat_ray.operations.journal import Row, read_rows
from cat_ray.operations.sample_keys import trained_on
from cat_ray.storage import Location, locate

COMMAND = str(Path(sys.executable).with_name("cat-ray"))
SIDE, CLASSES, SHARDS, SHARD_IMAGES = 64, 4, 4, 200
IMAGES = SHARDS * SHARD_IMAGES
# Of 12 KB each decoded: a window of a megabyte is 80 of them.
BATCH = 16
DOWN_SECONDS, PATIENCE_SECONDS = 30, 300


def write_shards(folder: Location, broken: frozenset[int] = frozenset()) -> None:
    """Smooth pictures with some noise, 8 KB each; of broken ones zeros."""
    written = [
        write_shard_file(
            folder,
            f"train-{shard:06d}.tar",
            [
                Entry(f"{number:06d}", encoded(number, number in broken), [number % CLASSES])
                for number in range(shard * SHARD_IMAGES, (shard + 1) * SHARD_IMAGES)
            ],
        )
        for shard in range(SHARDS)
    ]
    write_index(
        folder,
        Index(
            contents="images",
            resolution=SIDE,
            channels=3,
            class_counts=(IMAGES // CLASSES,) * CLASSES,
            source="a test",
            shards=tuple(each.shard for each in written),
            extents_sha256="",
        ),
        {each.shard.name: each.extents for each in written},
    )


def encoded(number: int, broken: bool) -> dict[str, bytes]:
    random = np.random.default_rng(number)
    slope = np.linspace(0, 200, SIDE)[:, None, None] + random.integers(0, 50, (SIDE, SIDE, 3))
    content = io.BytesIO()
    Image.fromarray(slope.astype(np.uint8)).save(content, format="PNG")
    image = bytes(len(content.getvalue())) if broken else content.getvalue()
    return {"png": image, "cls": str(number % CLASSES).encode()}


class Training:
    """A run of a tiny job on shards in S3; the run's own folder is on this disk."""

    def __init__(self, folder: Path, shards: Location, endpoint_url: str, *, images: int):
        network = {"size": {"depth": 2, "width": 32, "heads": 2}, "patch": 8}
        sections = {
            "run": {"folder": f"{folder}/run", "total_images": images},
            "data": {
                "shards": shards.uri,
                "num_classes": CLASSES,
                "block_images": 10,
                "window_megabytes": 1,
            },
            "storage": {"endpoint_url": endpoint_url},
            "model": {
                "resolution": SIDE,
                "channels": 3,
                "stages": 2,
                "generator": network,
                "discriminator": {**network, "projection_width": 32},
            },
            "optimisation": {"batch_size": BATCH, "lanes": 4},
            "workers": {"cpus_per_worker": 0.5, "max_failures": 0},
            "checkpoints": {"save_every_images": 160},
            "reporting": {
                "log_every_images": 80,
                "grid_every_images": images,
                "sample_keys": True,
            },
        }
        self.job = folder / "job.yaml"
        self.job.write_text(yaml.safe_dump(sections))
        self.run, self._log = locate(f"{folder}/run"), folder / "log"

    def start(self) -> subprocess.Popen:
        with self._log.open("w") as log:
            return subprocess.Popen([COMMAND, "train", str(self.job)], stdout=log, stderr=log)

    def told(self) -> str:
        return self._log.read_text()

    def rows(self) -> list[Row]:
        if not (self.run / "metrics.jsonl").exists():
            return []
        return [row for row in read_rows(self.run) if row["kind"] == "train"]

    def wait_for(self, images: int, process: subprocess.Popen) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not (rows := self.rows()) or rows[-1]["images"] < images:
            assert process.poll() is None and time.monotonic() < until, self.told()[-3000:]
            time.sleep(0.2)

    def times_each_was_seen(self) -> set[int]:
        """How often the samples were trained on: one number, if all came equally often."""
        counts = Counter(trained_on(self.run, starts_of(read_ledger(self.run))).keys)
        assert len(counts) == IMAGES
        return set(counts.values())


@pytest.fixture(scope="module")
def shards(s3_server) -> Location:
    place = locate(f"s3://{s3_server.bucket}/faults", s3_server.endpoint_url)
    write_shards(place)
    return place


# The default run has outages of seconds and one without an end: promises/test_bad_nights.py.
@pytest.mark.long
def test_storage_that_is_down_for_half_a_minute_delays_training_and_no_more(
    s3_server, shards, tmp_path
) -> None:
    training = Training(tmp_path, shards, s3_server.endpoint_url, images=2 * IMAGES)
    process = training.start()
    training.wait_for(160, process)
    s3_server.kill()
    try:
        time.sleep(DOWN_SECONDS)
        # All that had been read ahead is used up.
        seen = training.rows()[-1]["images"]
        assert process.poll() is None and seen < IMAGES
    finally:
        s3_server.start()
    assert process.wait(PATIENCE_SECONDS) == 0, training.told()[-3000:]
    assert training.times_each_was_seen() == {2}
    assert max(row["data_wait_share"] for row in training.rows()) > 0.5


class SlowStorage:
    """A way to a server on which each answer begins late and comes in small pieces."""

    DELAY_SECONDS, PIECE_BYTES, PIECE_SECONDS = 0.2, 2**14, 0.02

    def __init__(self, address: str):
        host, port = address.split(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            for ends, slow in (((client, server), False), ((server, client), True)):
                threading.Thread(target=self._pump, args=(*ends, slow), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, slow: bool) -> None:
        quiet_since = 0.0
        try:
            while piece := source.recv(self.PIECE_BYTES):
                if slow:
                    begins = time.monotonic() - quiet_since > self.DELAY_SECONDS
                    time.sleep(self.DELAY_SECONDS if begins else self.PIECE_SECONDS)
                    quiet_since = time.monotonic()
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()
            target.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def slow_storage(s3_server) -> Iterator[SlowStorage]:
    storage = SlowStorage(s3_server.address)
    yield storage
    storage.close()


# Slow storage is in promises/test_bad_nights.py too, broken samples in test_train.py.
@pytest.mark.long
def test_slow_storage_and_one_broken_image_in_a_hundred_lose_no_other(
    s3_server, slow_storage, tmp_path
) -> None:
    place = locate(f"s3://{s3_server.bucket}/one-in-a-hundred", s3_server.endpoint_url)
    broken = frozenset(range(50, IMAGES, 100))
    write_shards(place, broken)
    training = Training(tmp_path, place, slow_storage.endpoint_url, images=IMAGES)
    process = training.start()
    assert process.wait(PATIENCE_SECONDS) == 0, training.told()[-3000:]
    assert training.times_each_was_seen() == {1}
    rows = read_rows(training.run)
    named = [
        line.split(": ")[1] for row in rows if row["kind"] == "broken" for line in row["samples"]
    ]
    assert sorted(named) == [f"{number:06d}" for number in sorted(broken)]
    assert training.rows()[-1]["broken_samples"] == len(broken) == IMAGES // 100


def test_a_shard_that_vanishes_ends_the_run_which_goes_on_when_it_is_back(
    s3_server, tmp_path
) -> None:
    place = locate(f"s3://{s3_server.bucket}/vanishing", s3_server.endpoint_url)
    write_shards(place)
    vanishing = place / "train-000002.tar"
    kept = vanishing.read()
    training = Training(tmp_path, place, s3_server.endpoint_url, images=2 * IMAGES)
    process = training.start()
    training.wait_for(160, process)
    vanishing.delete()
    assert process.wait(PATIENCE_SECONDS) == 2, training.told()[-3000:]
    assert f"{vanishing.uri} doesn't exist" in training.told()
    assert "Traceback" not in training.told()

    # Nor does it begin again without it.
    process = training.start()
    assert process.wait(PATIENCE_SECONDS) == 2
    assert "train-000002.tar is missing" in training.told()

    vanishing.write(kept)
    process = training.start()
    assert process.wait(PATIENCE_SECONDS) == 0, training.told()[-3000:]
    assert training.times_each_was_seen() == {2}


@pytest.mark.parametrize(("what", "told"), [("key", "credentials"), ("bucket", "no-such-bucket")])
def test_storage_that_refuses_is_told_at_once(
    what, told, s3_server, shards, tmp_path, monkeypatch
) -> None:
    place = shards
    if what == "key":
        monkeypatch.setitem(os.environ, "AWS_SECRET_ACCESS_KEY", "not-the-secret")
    else:
        place = replace(shards, uri="s3://no-such-bucket/shards")
    training = Training(tmp_path, place, s3_server.endpoint_url, images=IMAGES)
    assert training.start().wait(PATIENCE_SECONDS) == 2
    assert told in training.told() and "Traceback" not in training.told()
    assert len(training.told().strip().splitlines()) <= 3
    assert "secret" not in training.told()
    assert not training.rows()
