"""What a pod's preStop hook runs, on a real Ray node."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

SCRIPT = Path(__file__).parents[2] / "cluster" / "image" / "drain-node"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, to which tests add nodes."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def drain(cluster: Cluster, node, seconds: int) -> subprocess.CompletedProcess:
    raylet = node.all_processes["raylet"][0].process.pid
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [SCRIPT, str(seconds), str(raylet)],
        env={**os.environ, "PATH": path, "RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=120,
    )


def alive(node) -> bool:
    return any(each["NodeID"] == node.node_id and each["Alive"] for each in ray.nodes())


def test_the_pre_stop_hook_drains_its_own_node_and_returns_when_the_raylet_has_ended(cluster):
    leaving, staying = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    told = drain(cluster, leaving, 100)
    assert told.returncode == 0, told.stderr
    assert leaving.all_processes["raylet"][0].process.poll() is not None
    assert alive(staying) and not alive(leaving)


def test_the_pre_stop_hook_ends_at_the_deadline_while_work_goes_on(cluster):
    @ray.remote(num_cpus=1, resources={"busy": 1})
    class Busy:
        def deadline(self) -> int | None:
            drained = ray._private.state.state.get_draining_nodes()
            return drained.get(ray.get_runtime_context().get_node_id())

    node = cluster.add_node(num_cpus=1, resources={"busy": 1})
    busy = Busy.remote()
    assert ray.get(busy.deadline.remote()) is None
    told = drain(cluster, node, 3)
    assert told.returncode == 0, told.stderr
    # What the training asks, for its own notice.
    assert ray._private.state.state.get_draining_nodes().get(node.node_id)
