"""What `cat-ray doctor` makes of facts: a sound cluster passes, each fault has its own finding."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from cat_ray.doctor.facts import (
    Clock,
    Disk,
    Facts,
    Link,
    Needs,
    Node,
    NodeFacts,
    Place,
    Reduction,
    Trial,
)
from cat_ray.doctor.finding import Finding
from cat_ray.doctor.findings import findings, passed
from cat_ray.doctor.table import findings_table, to_json

GIGA = 10**9
PINS = {"python": ">=3.11", "torch": "==2.13.0", "ray": "<2.62,>=2.60", "deepspeed": "==0.19.8"}
VERSIONS = {"python": "3.11.7", "torch": "2.13.0+cu130", "ray": "2.60.0", "deepspeed": "0.19.8"}
SOUND = NodeFacts(
    versions=VERSIONS,
    torch_gpus=2,
    shared_memory_bytes=64 * GIGA,
    ninja="/usr/bin/ninja",
    compiler="/usr/bin/c++",
    staging=Disk("/nvme", 500 * GIGA, 1000 * GIGA),
    ray_temp=Disk("/tmp/ray", 50 * GIGA, 100 * GIGA),
    open_files=65536,
)
NAMES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
PORTS = (32768, 46883, 60999)
PLACE = Place(
    key="run.folder",
    uri="s3://bucket/run",
    written=True,
    local=False,
    trials=tuple(Trial(name, 1e8, 2e8, 0.02) for name in NAMES),
)
CLUSTER = Facts(
    pins=PINS,
    needs=Needs(gpu=True, workers=4, most_workers=6, window_bytes=GIGA, checkpoint_bytes=20 * GIGA),
    nodes=tuple(Node(name, 8.0, 2.0, 30 * GIGA, SOUND, Clock(0.0, 0.001)) for name in NAMES),
    links=tuple(Link(a, b, PORTS, {}) for a in NAMES for b in NAMES if a != b),
    reduction=Reduction("nccl", NAMES, 2**28, 0.1, 2e-5),
    places=(PLACE,),
)


def with_node(cluster: Facts, number: int = 1, **changes: object) -> Facts:
    """The same but for a node; what it says of itself and what Ray says of it may change."""
    nodes = list(cluster.nodes)
    own = {name: changes.pop(name) for name in list(changes) if hasattr(SOUND, name)}
    told = replace(SOUND, **own)
    nodes[number] = replace(nodes[number], **{"facts": told, **changes})
    return replace(cluster, nodes=tuple(nodes))


def with_place(**changes: object) -> Facts:
    return replace(CLUSTER, places=(replace(PLACE, **changes),))


def refused(step: str, reason: str, **changes: object) -> Facts:
    trials = (*PLACE.trials[:2], Trial(NAMES[2], 1e8, refused=step, reason=reason))
    return with_place(trials=trials, **changes)


def with_reduction(**changes: object) -> Facts:
    assert CLUSTER.reduction is not None
    return replace(CLUSTER, reduction=replace(CLUSTER.reduction, **changes))


def blocked(*ports: int) -> Facts:
    links = list(CLUSTER.links)
    links[3] = replace(links[3], blocked=dict.fromkeys(ports, "timed out"))
    return replace(CLUSTER, links=tuple(links))


FULL = Disk("/tmp/ray", 4 * GIGA, 100 * GIGA)
FAULTS = {
    "a node is silent": (
        with_node(CLUSTER, facts=None, clock=None, silence="No module named 'cat_ray'"),
        ("nodes", "fail", "no answer from 10.0.0.2: No module named 'cat_ray'", "installed"),
    ),
    "another version on one node": (
        with_node(CLUSTER, versions={**VERSIONS, "deepspeed": "0.18.0"}),
        (
            "versions",
            "fail",
            "deepspeed 0.19.8 on 10.0.0.1, 10.0.0.3, 0.18.0 on 10.0.0.2 (cat-ray needs ==0.19.8)",
            "install deepspeed==0.19.8",
        ),
    ),
    "allowed, but not the same": (
        with_node(CLUSTER, versions={**VERSIONS, "ray": "2.61.0"}),
        ("versions", "fail", "ray 2.60.0 on 10.0.0.1, 10.0.0.3, 2.61.0 on 10.0.0.2", "one image"),
    ),
    "not installed on one node": (
        with_node(CLUSTER, versions={**VERSIONS, "deepspeed": None}),
        ("versions", "fail", "none on 10.0.0.2", "deepspeed==0.19.8"),
    ),
    "another build of torch": (
        with_node(CLUSTER, versions={**VERSIONS, "torch": "2.13.0+cpu"}),
        ("versions", "warn", "torch 2.13.0+cu130 on", "one image"),
    ),
    "the same wrong version everywhere": (
        replace(CLUSTER, pins={**PINS, "torch": "==2.14.0"}),
        ("versions", "fail", "torch 2.13.0+cu130 on 10.0.0.1, 10.0.0.2, 10.0.0.3", "torch==2.14"),
    ),
    "torch sees fewer GPUs": (
        with_node(CLUSTER, torch_gpus=0),
        ("GPUs", "fail", "10.0.0.2: torch 0, Ray 2", "driver"),
    ),
    "no ninja": (
        with_node(CLUSTER, ninja=None),
        ("build tools", "fail", "no ninja on 10.0.0.2", "ninja-build"),
    ),
    "no compiler": (
        with_node(CLUSTER, compiler=None),
        ("build tools", "fail", "no C++ compiler on 10.0.0.2", "g++"),
    ),
    "too little shared memory for Ray": (
        with_node(CLUSTER, shared_memory_bytes=64 * 10**6),
        ("shared memory", "fail", "10.0.0.2: 64 MB of 30 GB", "--shm-size"),
    ),
    "too small an object store for the job": (
        with_node(CLUSTER, object_store_bytes=GIGA),
        ("shared memory", "warn", "10.0.0.2: 1 GB of 2 GB", "data.window_megabytes"),
    ),
    "no room for a checkpoint": (
        with_node(CLUSTER, staging=Disk("/nvme", 9 * GIGA, 1000 * GIGA)),
        # Two of at least four workers: half of it.
        (
            "checkpoint disk",
            "fail",
            "10.0.0.2: 9 GB free at /nvme, a checkpoint needs 10 GB",
            "checkpoints.local_folder",
        ),
    ),
    "Ray's disk is full": (
        with_node(CLUSTER, ray_temp=FULL),
        ("Ray's disk", "fail", "10.0.0.2: 4% of 100 GB free at /tmp/ray", "--temp-dir"),
    ),
    "Ray's disk is nearly full": (
        with_node(CLUSTER, ray_temp=replace(FULL, free_bytes=8 * GIGA)),
        ("Ray's disk", "warn", "10.0.0.2: 8% of 100 GB free", "--temp-dir"),
    ),
    "very few open files": (
        with_node(CLUSTER, open_files=1024),
        ("open files", "fail", "limit 1,024 on 10.0.0.2", "ulimit -n 65536"),
    ),
    "few open files": (
        with_node(CLUSTER, open_files=5000),
        ("open files", "warn", "limit 5,000 on 10.0.0.2", "ulimit -n"),
    ),
    "a clock is far off": (
        with_node(CLUSTER, clock=Clock(-60.0, 0.001)),
        ("clocks", "fail", "10.0.0.1 is 60 s ahead of 10.0.0.2", "chrony"),
    ),
    "a clock is off": (
        with_node(CLUSTER, clock=Clock(2.5, 0.001)),
        ("clocks", "warn", "10.0.0.2 is 2.5 s ahead of 10.0.0.1", "chrony"),
    ),
    "a port is blocked": (
        blocked(60999),
        ("ports", "fail", "10.0.0.2 to 10.0.0.3: port 60999 (timed out)", "NetworkPolicy"),
    ),
    "the processes don't meet": (
        with_reduction(seconds=None, latency_seconds=None, failures=((NAMES[1], "timed out"),)),
        ("all-reduce", "fail", "10.0.0.2: timed out", "NCCL_SOCKET_IFNAME"),
    ),
    "a read-only bucket": (
        refused("write", "ACCESS_DENIED"),
        ("storage: run.folder", "fail", "write failed on 10.0.0.3: ACCESS_DENIED", "read-only"),
    ),
    "an endpoint where nobody listens": (
        refused("write", "curlCode: 7, Could not connect to server"),
        ("storage: run.folder", "fail", "Could not connect to server", "storage.endpoint_url"),
    ),
    "deletion is not allowed": (
        refused("delete", "ACCESS_DENIED"),
        ("storage: run.folder", "fail", "delete failed on 10.0.0.3", "allow to put and delete"),
    ),
    "a disk that is not shared": (
        refused("see", "not to be seen", uri="/runs/1", local=True),
        ("storage: run.folder", "fail", "/runs/1: see failed on 10.0.0.3", "all nodes mount"),
    ),
    "a probe that stays": (
        with_place(left_behind=("s3://bucket/run/.probe",)),
        ("storage: run.folder", "warn", "s3://bucket/run/.probe can't be taken away", "delete it"),
    ),
    "shards that nobody has made": (
        refused("list", "there is no index.json", key="data.shards", written=False),
        ("storage: data.shards", "fail", "there is no index.json", "cat-ray prepare"),
    ),
    "no storage is named": (
        replace(CLUSTER, places=()),
        ("storage", "warn", "not tried", "--storage"),
    ),
}


def unsound(found: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in found if finding.verdict != "pass"]


def test_a_sound_cluster_passes_every_check_and_its_figures_are_told():
    found = findings(CLUSTER)
    assert not unsound(found)
    assert passed(found)
    told = {finding.check: finding.found for finding in found}
    assert told["nodes"] == "3 nodes, 24 CPUs and 6 GPUs by Ray's count"
    assert told["GPUs"] == "6 GPUs on 3 nodes, torch and Ray agree"
    # 2**28 bytes in a tenth of a second, twice two thirds of it on each link.
    assert told["all-reduce"] == "nccl, 3 processes on 3 nodes: 3.58 GB/s, latency 20 µs"
    assert "write 100 MB/s, read 200 MB/s, list 20 ms, from 3 nodes" in told["storage: run.folder"]
    assert told["ports"] == "6 connections on ports 32768 to 60999"


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_gives_its_own_finding_and_no_other(fault: str):
    facts, (check, verdict, told, advice) = FAULTS[fault]
    found = findings(facts)
    (finding,) = unsound(found)
    assert (finding.check, finding.verdict) == (check, verdict)
    assert told in finding.found
    assert advice in finding.advice
    assert passed(found) == (verdict == "warn")


def test_what_the_round_trip_leaves_open_is_no_fault_of_a_clock():
    assert passed(findings(with_node(CLUSTER, clock=Clock(11.0, 24.0))))
    assert not unsound(findings(with_node(CLUSTER, clock=Clock(11.0, 24.0))))


def test_a_head_without_gpus_that_trains_nothing_is_no_fault():
    head = Node("10.0.0.9", 0.0, 0.0, GIGA, replace(SOUND, torch_gpus=0), Clock(0.0, 0.001))
    assert not unsound(findings(replace(CLUSTER, nodes=(head, *CLUSTER.nodes))))


def test_a_job_that_wants_gpus_fails_on_a_cluster_without():
    facts = CLUSTER
    for number in range(3):
        facts = with_node(facts, number, torch_gpus=0, gpus=0.0)
    (finding,) = unsound(findings(facts))
    assert (finding.check, finding.verdict) == ("GPUs", "fail")
    assert "workers.gpu=false" in finding.advice


def test_where_no_node_answers_nothing_else_is_claimed():
    facts = CLUSTER
    for number in range(3):
        facts = with_node(facts, number, facts=None, clock=None, silence="nothing came")
    (finding,) = findings(facts)
    assert (finding.check, finding.verdict) == ("nodes", "fail")


def test_a_laptop_without_shared_memory_passes():
    (laptop,) = with_node(CLUSTER, 0, shared_memory_bytes=None).nodes[:1]
    link = Link(laptop.name, laptop.name, PORTS, {})
    reduction = Reduction("gloo", (laptop.name, laptop.name), 2**24, 0.1, 1e-4)
    facts = replace(
        CLUSTER, nodes=(laptop,), links=(link,), reduction=reduction, needs=Needs(gpu=True)
    )
    assert not unsound(findings(facts))


def test_the_table_fits_in_100_columns_and_has_all_of_what_was_found():
    facts, (_, _, told, _) = FAULTS["another version on one node"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(findings_table(findings(facts)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join("".join(lines).replace("│", " ").split())
    assert " ".join(told.split()) in text
    assert "-> the same on all nodes" in text


def test_a_script_is_told_the_findings_and_the_facts():
    facts, (check, *_) = FAULTS["a read-only bucket"]
    content = json.loads(to_json(facts, findings(facts)))
    assert content["passed"] is False
    assert [each["check"] for each in content["findings"] if each["verdict"] != "pass"] == [check]
    assert content["facts"]["nodes"][0]["facts"]["versions"]["ray"] == "2.60.0"
    assert content["facts"]["places"][0]["trials"][2]["refused"] == "write"
