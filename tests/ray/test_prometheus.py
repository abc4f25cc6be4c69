"""A run's metrics as Prometheus finds them, on a real Ray: an HTTP GET of what its agent serves."""

import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import ray
from ray.util import get_node_ip_address

from cat_ray.config import parse
from cat_ray.operations.goodput import BINS, LEDGER, Row
from cat_ray.operations.prometheus import METRICS, Exported
from cat_ray.storage import locate
from cat_ray.training.driver import train

WAIT_SECONDS = 300
SAMPLE = re.compile(r"^ray_(cat_ray_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of the metrics of a Ray like the one that the command starts, but for the fixed port."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=port,
    )
    yield f"http://{get_node_ip_address()}:{port}/metrics"
    ray.shutdown()


def scraped(url: str, run: str, until: set[str]) -> dict[str, tuple[str, float]]:
    """The metrics of a run, once these are there: the type and the value of each."""
    patience = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                text = answer.read().decode()
        except urllib.error.URLError:
            text = ""
        types = dict(re.findall(r"^# TYPE ray_(cat_ray_\w+) (\w+)$", text, re.MULTILINE))
        found = {
            name: (types[name], float(value))
            for name, labels, value in SAMPLE.findall(text)
            if f'run="{run}"' in labels
        }
        if until <= found.keys():
            return found
        assert time.monotonic() < patience, f"{until - found.keys()} didn't come"
        time.sleep(0.5)


def test_a_run_is_seen_by_prometheus(url: str, tiny_job: str) -> None:
    changes = ["cost.spot_per_gpu_hour=3600", "checkpoints.save_every_images=64"]
    config = parse(tiny_job, "job.yaml", changes)
    train(config)
    names = {metric.name for metric in METRICS}
    # Nothing was lost or started again, and no FID measured.
    names -= {"cat_ray_lost_images_total", "cat_ray_restarts_total", "cat_ray_fid"}
    found = scraped(url, locate(config.run.folder).uri, names)
    assert found["cat_ray_images_total"] == ("counter", 64)
    assert found["cat_ray_world_size"] == ("gauge", 2)
    speed, step = found["cat_ray_images_per_second"][1], found["cat_ray_step_seconds"][1]
    assert speed * step == pytest.approx(16)
    assert 0 <= found["cat_ray_data_wait_seconds"][1] < step
    assert 0 < found["cat_ray_goodput_ratio"][1] < 1
    # A dollar a second, for two workers.
    assert found["cat_ray_cost_dollars_total"][1] > 2 * step


def test_names_kinds_and_values_are_those_of_the_table(url: str, tmp_path) -> None:
    run = locate(str(tmp_path))
    nothing = dict.fromkeys(BINS, 0.0)
    ledger = [
        Row("first", 0, 1, 0.0, 0.0, 0, nothing, session="a"),
        Row("first", 0, 1, 0.0, 100.0, 100, nothing | {"train": 100.0}, session="a"),
        Row("second", 0, 1, 100.0, 100.0, 60, nothing, session="a"),
        Row("second", 0, 1, 100.0, 150.0, 110, nothing | {"train": 50.0}, session="a"),
    ]
    content = "".join(json.dumps(asdict(row)) + "\n" for row in ledger)
    (run / LEDGER / "rows.jsonl").write(content.encode())
    told = {"session": "a", "images": 110}
    rows = [
        {"kind": "train", **told, "images_per_second": 4.0, "data_wait_share": 0.5},
        {"kind": "checkpoint", **told, "stall_seconds": 0.25},
        {"kind": "measured", **told, "metric": "fid5k_adm", "fid5k_adm": 12.5},
    ]
    Exported(run, "a", 16, price_per_hour=3600.0).update(rows)
    found = scraped(url, run.uri, {metric.name for metric in METRICS})
    assert {name: kind for name, (kind, _) in found.items()} == {
        metric.name: metric.kind for metric in METRICS
    }
    expected = {
        "cat_ray_images_total": 150,
        "cat_ray_images_per_second": 4,
        "cat_ray_step_seconds": 4,
        "cat_ray_data_wait_seconds": 2,
        "cat_ray_save_stall_seconds": 0.25,
        "cat_ray_world_size": 1,
        "cat_ray_goodput_ratio": 110 / 150,
        "cat_ray_cost_dollars_total": 150,
        "cat_ray_fid": 12.5,
        "cat_ray_lost_images_total": 40,
        "cat_ray_restarts_total": 1,
    }
    assert {name: value for name, (_, value) in found.items()} == pytest.approx(expected)
