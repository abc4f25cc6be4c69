"""What was found out about a cluster: plain values, from which the findings follow."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Disk:
    """The disk below a folder, which needn't exist yet."""

    folder: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself, in a process that Ray started there.

    Attributes:
        versions: by package, and Python's; None for what is not installed.
        torch_gpus: GPUs that torch can use.
        shared_memory_bytes: the size of /dev/shm; None where there is none, as on a Mac.
        ninja: its path, or None.
        compiler: the path of the C++ compiler, or None.
        staging: where a worker's part of a checkpoint waits for its upload.
        ray_temp: where Ray keeps sockets, logs, and objects that memory has no room for.
        open_files: how many files a process may have open, its soft limit.
    """

    versions: Mapping[str, str | None]
    torch_gpus: int
    shared_memory_bytes: int | None
    ninja: str | None
    compiler: str | None
    staging: Disk
    ray_temp: Disk
    open_files: int


@dataclass(frozen=True)
class Clock:
    """A node's clock against the driver's, known to half the round trip."""

    ahead_seconds: float
    round_trip_seconds: float


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        name: its address, with the start of Ray's id where several nodes have the same one.
        cpus: as Ray counts them.
        gpus: as Ray counts them.
        object_store_bytes: of memory that Ray takes for objects.
        facts: None if the node didn't answer.
        clock: likewise.
        silence: why it didn't.
    """

    name: str
    cpus: float
    gpus: float
    object_store_bytes: int
    facts: NodeFacts | None
    clock: Clock | None = None
    silence: str = ""


@dataclass(frozen=True)
class Link:
    """TCP from one node to ports that another one listens on.

    Attributes:
        source: the node that connects.
        target: the node that listens.
        ports: all that were tried, low, middle and high of the range that connections get.
        blocked: those that couldn't be connected to in time, with the reason.
    """

    source: str
    target: str
    ports: tuple[int, ...]
    blocked: Mapping[int, str]


@dataclass(frozen=True)
class Reduction:
    """An all-reduce of one process on each node, or of two where there is one node only.

    Attributes:
        backend: nccl or gloo.
        members: the node of each process.
        bytes: of the large tensor.
        seconds: median time for it.
        latency_seconds: median time for a single number.
        failures: the processes that didn't get to the end, as (node, reason).
    """

    backend: str
    members: tuple[str, ...]
    bytes: int
    seconds: float | None
    latency_seconds: float | None
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second that each link has to carry for this: `busbw` of NVIDIA's nccl-tests."""
        size = len(self.members)
        if self.seconds is None or size < 2:
            return None
        return self.bytes / self.seconds * 2 * (size - 1) / size


@dataclass(frozen=True)
class Trial:
    """What one node could do at a place in storage. Rates are in bytes per second.

    Attributes:
        node: which one.
        write_rate: None where nothing was to be written.
        read_rate: None where there was nothing to read.
        list_seconds: for one listing.
        refused: the step that failed: list, write, read, see, or delete.
        reason: why it did.
    """

    node: str
    write_rate: float | None = None
    read_rate: float | None = None
    list_seconds: float | None = None
    refused: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Place:
    """A place in storage that the job uses.

    Attributes:
        key: how it is named: `run.folder`, `data.shards` or `--storage`.
        uri: where it is.
        written: whether it was written to, or only read.
        local: whether it is a path, which must be the same disk on all nodes.
        trials: what each node could do there.
        left_behind: what the probing couldn't take away again.
    """

    key: str
    uri: str
    written: bool
    local: bool
    trials: tuple[Trial, ...]
    left_behind: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needs:
    """What a job needs of the nodes.

    Attributes:
        gpu: whether its workers have a GPU each.
        workers: how many it has at least.
        most_workers: how many at most.
        cpus_per_worker: of Ray's CPUs.
        window_bytes: of decoded samples that the object store holds for each worker.
        checkpoint_bytes: of a whole checkpoint, estimated from the number of parameters.
    """

    gpu: bool
    workers: int = 1
    most_workers: int = 1
    cpus_per_worker: float = 1.0
    window_bytes: int = 0
    checkpoint_bytes: int = 0

    def workers_on(self, node: Node) -> int:
        """How many of the job's workers may run on a node."""
        room = node.gpus if self.gpu else node.cpus / self.cpus_per_worker
        return min(self.most_workers, int(room))

    def staging_bytes_on(self, node: Node) -> int:
        """Bytes of the parts of a checkpoint that may wait on a node for their upload."""
        return int(self.checkpoint_bytes * min(1.0, self.workers_on(node) / self.workers))


@dataclass(frozen=True)
class Facts:
    """All that was found out.

    Attributes:
        pins: which versions the package asks for, by package, in pip's notation.
        needs: of the job.
        nodes: the first is the driver's own, if that is known.
        links: between each two nodes, in both directions.
        reduction: None if it couldn't be tried.
        places: of the job's storage.
    """

    pins: Mapping[str, str]
    needs: Needs
    nodes: tuple[Node, ...]
    links: tuple[Link, ...]
    reduction: Reduction | None
    places: tuple[Place, ...]
