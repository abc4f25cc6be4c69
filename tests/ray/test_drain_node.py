"""What a pod's preStop hook runs, on real Ray nodes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

HOOK = Path(__file__).parents[2] / "cluster" / "image" / "drain-node"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, as in cluster/."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@ray.remote(num_cpus=1, resources={"busy": 1})
class Busy:
    """An actor that keeps its node from being idle."""

    def node_id(self) -> str:
        return ray.get_runtime_context().get_node_id()


def raylet(node) -> subprocess.Popen:
    return node.all_processes["raylet"][0].process


def drain(cluster: Cluster, node, seconds: int) -> None:
    """Runs the hook; this machine has more raylets than a pod, so it is told which one."""
    subprocess.run(
        [HOOK, str(seconds), str(raylet(node).pid)],
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_ADDRESS": cluster.address,
        },
        check=True,
        timeout=180,
    )


def test_the_hook_drains_its_own_node_until_nothing_is_left_to_do_or_the_time_is_over(cluster):
    idle, busy = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1, resources={"busy": 1})
    actor = Busy.remote()
    assert ray.get(actor.node_id.remote()) == busy.node_id

    drain(cluster, idle, 150)
    assert raylet(idle).poll() is not None
    assert raylet(busy).poll() is None

    drain(cluster, busy, 1)
    assert raylet(busy).poll() is None
    # What Ray Train asks, to tell the workers.
    assert busy.node_id in ray._private.state.state.get_draining_nodes()
