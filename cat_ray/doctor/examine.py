"""Has every node of a cluster find facts out about itself, its neighbours and the storage."""

import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import metadata, requires
from typing import Any

import ray
from packaging.requirements import Requirement
from ray.actor import ActorHandle

from cat_ray.config import Config
from cat_ray.connection import connected
from cat_ray.doctor.all_reduce import Member
from cat_ray.doctor.asking import gather, pinned
from cat_ray.doctor.facts import Clock, Facts, Link, Needs, Node, NodeFacts, Reduction, Trial
from cat_ray.doctor.links import Listener, links_to
from cat_ray.doctor.needs import needs_of
from cat_ray.doctor.node import facts_here
from cat_ray.doctor.places import Asked, places_of, probe
from cat_ray.doctor.storage_probe import try_reading, try_writing
from cat_ray.errors import ExpectedError
from cat_ray.versions import PACKAGES

PACKAGE = "cat-ray"
CLOCK_QUESTIONS = 5
CONNECT_SECONDS = 3.0


class Examiner:
    """The process on each node that looks around there."""

    def __init__(self, name: str, ipv6: bool):
        self._name = name
        self._listener = Listener(ipv6)

    def facts(self, staging_folder: str) -> NodeFacts:
        """What the node says of itself."""
        return facts_here(staging_folder, ray.get_runtime_context().get_temp_dir())

    def now(self) -> float:
        """Its clock, in seconds since 1970."""
        return time.time()

    def ports(self) -> tuple[int, ...]:
        """The ports on which it waits for connections."""
        return self._listener.ports

    def links(self, targets: list[tuple[str, str, tuple[int, ...]]]) -> list[Link]:
        """Connections from here; see `links_to`."""
        return links_to(self._name, targets, CONNECT_SECONDS)

    def trial(self, asked: Asked, name: str, mark: str) -> Trial:
        """Probes a place in storage from here."""
        try:
            folder = asked.location()
        except ExpectedError as error:
            return Trial(self._name, refused="list", reason=str(error))
        if asked.written:
            return try_writing(self._name, folder, name, mark)
        return try_reading(self._name, folder)


def examine(
    config: Config | None, uri: str | None, endpoint_url: str | None, reduce_seconds: float
) -> Facts:
    """Looks at the cluster of RAY_ADDRESS, or at this machine.

    Args:
        config: the job whose needs and storage count, if there is one.
        uri: a place in storage beside the job's.
        endpoint_url: of that place, if it isn't the job's.
        reduce_seconds: for how long the processes of the all-reduce may wait for each other.

    Raises:
        BadInput: a URI is none, or no cluster answers.
        RunFailed: the cluster has another version of Python or Ray than this machine.
    """
    asked = places_of(config, uri, endpoint_url)
    with connected(1, {}):
        alive = [each for each in ray.nodes() if each["Alive"]]
        own = ray.get_runtime_context().get_node_id()
        alive.sort(key=lambda each: (each["NodeID"] != own, each["NodeManagerAddress"]))
        addresses = Counter(each["NodeManagerAddress"] for each in alive)
        silent = {each["NodeID"]: _silent_node(each, addresses) for each in alive}
        address = {each["NodeID"]: each["NodeManagerAddress"] for each in alive}
        examiners = {
            key: pinned(Examiner, key, num_cpus=0).remote(node.name, ":" in address[key])
            for key, node in silent.items()
        }
        staging = _staging_folder(config)
        answers, reasons = gather(
            {key: examiner.facts.remote(staging) for key, examiner in examiners.items()}
        )
        examiners = {key: examiners[key] for key in silent if key in answers}
        nodes = {
            key: replace(
                node,
                facts=answers.get(key),
                clock=_clock(examiners[key]) if key in examiners else None,
                silence=reasons.get(key, ""),
            )
            for key, node in silent.items()
        }
        usable = any(n.gpus and n.facts and n.facts.torch_gpus for n in nodes.values())
        needs = needs_of(config) if config else Needs(gpu=usable)
        answering = {key: nodes[key] for key in examiners}
        return Facts(
            pins=_pins(),
            needs=needs,
            nodes=tuple(nodes.values()),
            links=_links(examiners, answering, address),
            reduction=_reduction(answering, address, needs.gpu and usable, reduce_seconds),
            places=tuple(probe(each, examiners, answering) for each in asked),
        )


def _silent_node(row: Mapping[str, Any], addresses: Mapping[str, int]) -> Node:
    """A node as Ray has it, before it has answered."""
    name = address = row["NodeManagerAddress"]
    if addresses[address] > 1:
        name = f"{address}/{row['NodeID'][:6]}"
    counted = row["Resources"]
    return Node(
        name=name,
        cpus=counted.get("CPU", 0.0),
        gpus=counted.get("GPU", 0.0),
        object_store_bytes=int(counted.get("object_store_memory", 0)),
        facts=None,
    )


def _clock(examiner: ActorHandle) -> Clock | None:
    """As NTP does: the answer was given halfway, give or take; the quickest of a few counts."""
    clocks = []
    for number in range(CLOCK_QUESTIONS):
        begun = time.time()
        answers, _ = gather({number: examiner.now.remote()})
        ended = time.time()
        clocks += [Clock(now - (begun + ended) / 2, ended - begun) for now in answers.values()]
    return min(clocks, key=lambda clock: clock.round_trip_seconds, default=None)


def _staging_folder(config: Config | None) -> str:
    if config is None:
        return tempfile.gettempdir()
    run = config.storage.locate(config.run.folder)
    # A run on a disk is written in place.
    place = run.local_path or config.checkpoints.local_folder or tempfile.gettempdir()
    return str(place)


def _links(
    examiners: Mapping[str, ActorHandle],
    nodes: Mapping[str, Node],
    address: Mapping[str, str],
) -> tuple[Link, ...]:
    """From each node to each other one; a lone node connects to itself."""
    ports, _ = gather({key: each.ports.remote() for key, each in examiners.items()})
    asked = {}
    for key, examiner in examiners.items():
        others = [other for other in ports if other != key] or [key]
        targets = [(nodes[other].name, address[other], ports[other]) for other in others]
        asked[key] = examiner.links.remote(targets)
    found, _ = gather(asked)
    return tuple(link for key in examiners for link in found.get(key, ()))


def _reduction(
    nodes: Mapping[str, Node], address: Mapping[str, str], gpu: bool, seconds: float
) -> Reduction | None:
    backend = "nccl" if gpu else "gloo"
    size = (lambda node: node.gpus) if gpu else (lambda node: node.cpus)
    # A head that trains nothing needn't have the network that workers need.
    members = [key for key in nodes if size(nodes[key]) >= 1] or list(nodes)
    if len(members) == 1 and (not gpu or nodes[members[0]].gpus >= 2):
        members *= 2
    if not members:
        return None
    actors = [
        pinned(Member, key, num_cpus=0, num_gpus=int(gpu and nodes[key].gpus >= 1)).remote()
        for key in members
    ]
    names = tuple(nodes[key].name for key in members)
    try:
        ports, reasons = gather(
            {rank: actor.free_port.remote() for rank, actor in enumerate(actors)}
        )
        found: dict[int, tuple[int, float, float]] = {}
        if not reasons:
            asked = {
                rank: actor.reduce.remote(
                    rank, len(actors), address[members[0]], ports[0], backend, seconds
                )
                for rank, actor in enumerate(actors)
            }
            # The processes themselves give up first, and say why.
            found, reasons = gather(asked, 1.5 * seconds)
        large, taken, latency = found.get(0, (0, None, None))
        failures = tuple((names[rank], reason) for rank, reason in sorted(reasons.items()))
        return Reduction(backend, names, large, taken, latency, failures)
    finally:
        for actor in actors:
            ray.kill(actor)


def _pins() -> dict[str, str]:
    """What the installed package asks for, by package."""
    needed = [Requirement(line) for line in requires(PACKAGE) or ()]
    pins = {each.name: str(each.specifier) for each in needed if each.name in PACKAGES}
    return {"python": metadata(PACKAGE)["Requires-Python"] or "", **pins}
