"""From facts to findings: what is right, what is wrong, and what to do about it. Pure."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.specifiers import SpecifierSet

from cat_ray.doctor.facts import Facts, Link, Node, NodeFacts, Place

Verdict = Literal["pass", "warn", "fail"]
MEGA, GIGA = 10**6, 10**9
# A notice of preemption is an absolute time, 30 s ahead on Google Cloud and Azure: a clock that
# is a second off takes a part of it, one that is ten off all that a save needs.
CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 1.0, 10.0
# With so much free Ray's raylet stops writing objects (`local_fs_capacity_threshold`).
RAY_FULL, RAY_LITTLE_FREE = 0.05, 0.10
# Ray's own limits, in ray/_private/worker.py.
FEW_OPEN_FILES, ENOUGH_OPEN_FILES = 4096, 8192
NAMES_SHOWN = 3
KUBERNETES_SHM = "in Kubernetes mount an emptyDir of medium Memory there, in Docker use --shm-size"


@dataclass(frozen=True)
class Finding:
    """One check: what was found, and what to do if it is not right."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


def findings(facts: Facts) -> tuple[Finding, ...]:
    """All findings, in the order in which a cluster is best put right."""
    checks = (
        _answers,
        _versions,
        _gpus,
        _tools,
        _shared_memory,
        _staging,
        _ray_temp,
        _open_files,
        _clocks,
        _ports,
        _all_reduce,
    )
    if not _answering(facts):
        return (_answers(facts),)
    return (*(check(facts) for check in checks), *_storage(facts.places))


def passed(found: Iterable[Finding]) -> bool:
    """Whether nothing failed; warnings are no failures."""
    return all(finding.verdict != "fail" for finding in found)


def _answers(facts: Facts) -> Finding:
    gpus, cpus = (sum(getattr(n, what) for n in facts.nodes) for what in ("gpus", "cpus"))
    counted = f"{_many(len(facts.nodes), 'node')}, {cpus:g} CPUs and {gpus:g} GPUs by Ray's count"
    silent = [node for node in facts.nodes if node.facts is None]
    if not silent:
        return Finding("nodes", "pass", counted)
    told = "; ".join(f"{node.name}: {node.silence}" for node in silent)
    advice = "no process starts there: is cat-ray installed, is the disk full, is the node alive?"
    return Finding("nodes", "fail", f"{counted}; no answer from {told}", advice)


def _versions(facts: Facts) -> Finding:
    answers = _answering(facts)
    wrong, installs, builds = [], [], []
    for package in dict.fromkeys(name for _, each in answers for name in each.versions):
        pin = facts.pins.get(package, "")
        by_version: dict[str | None, list[str]] = defaultdict(list)
        for node, each in answers:
            by_version[each.versions.get(package)].append(node.name)
        unpinned = any(not _satisfies(version, pin) for version in by_version)
        groups = {version and version.partition("+")[0] for version in by_version}
        told = ", ".join(
            f"{version or 'none'} on {_names(names)}" for version, names in by_version.items()
        )
        if unpinned or len(groups) > 1:
            wrong.append(f"{package} {told}" + f" (cat-ray needs {pin})" * bool(pin))
            installs.append(f"{package}{pin}" if pin else package)
        elif len(by_version) > 1:
            builds.append(f"{package} {told}")
    if wrong:
        advice = f"the same on all nodes: one image, or install {', '.join(installs)}"
        return Finding("versions", "fail", "; ".join(wrong), advice)
    if builds:
        advice = "two builds of one version may round otherwise: use one image for all workers"
        return Finding("versions", "warn", "; ".join(builds), advice)
    same = answers[0][1].versions if answers else {}
    told = ", ".join(f"{name} {version}" for name, version in same.items())
    return Finding("versions", "pass", told)


def _gpus(facts: Facts) -> Finding:
    answers = _answering(facts)
    differ = [
        f"{node.name}: torch {each.torch_gpus}, Ray {node.gpus:g}"
        for node, each in answers
        if node.gpus != each.torch_gpus
    ]
    if differ:
        advice = (
            "install a torch build and a driver that fit the GPUs; start Ray with "
            "--num-gpus=THEIR_NUMBER, and give the container all of them"
        )
        return Finding("GPUs", "fail", f"GPUs of {'; '.join(differ)}", advice)
    count = sum(each.torch_gpus for _, each in answers)
    if facts.needs.gpu and not count:
        advice = "add nodes with GPUs, or set workers.gpu=false"
        return Finding("GPUs", "fail", "none, and the job's workers want one each", advice)
    on = sum(1 for _, each in answers if each.torch_gpus)
    told = f"{_many(count, 'GPU')} on {_many(on, 'node')}, torch and Ray agree" if count else "none"
    return Finding("GPUs", "pass", told)


def _tools(facts: Facts) -> Finding:
    answers = _answering(facts)
    lacking = {
        "ninja": [node.name for node, each in answers if each.ninja is None],
        "a C++ compiler": [node.name for node, each in answers if each.compiler is None],
    }
    missing = [f"no {what} on {_names(names)}" for what, names in lacking.items() if names]
    if missing:
        advice = "apt-get install g++ ninja-build (or pip install ninja, on PATH) in the image"
        found = f"{', '.join(missing)}: DeepSpeed builds an operator at first use"
        return Finding("build tools", "fail", found.replace("no a ", "no "), advice)
    pairs = Counter(f"{each.ninja}, {each.compiler}" for _, each in answers)
    return Finding("build tools", "pass", "; ".join(pairs))


def _shared_memory(facts: Facts) -> Finding:
    small, tight, sizes, stores = [], [], [], []
    for node, each in _answering(facts):
        needed = facts.needs.workers_on(node) * facts.needs.window_bytes
        stores.append(node.object_store_bytes)
        if each.shared_memory_bytes is not None:
            sizes.append(each.shared_memory_bytes)
            least = max(node.object_store_bytes, needed)
            if each.shared_memory_bytes < least:
                small.append((node.name, each.shared_memory_bytes, least))
                continue
        if node.object_store_bytes < needed:
            tight.append((node.name, node.object_store_bytes, needed))
    if small:
        told = "; ".join(f"{name}: {_size(has)} of {_size(least)}" for name, has, least in small)
        advice = f"make /dev/shm as large as Ray's object store; {KUBERNETES_SHM}"
        found = f"/dev/shm is too small, Ray keeps objects on disk. {told}"
        return Finding("shared memory", "fail", found, advice)
    if tight:
        told = "; ".join(f"{name}: {_size(has)} of {_size(least)}" for name, has, least in tight)
        advice = "start Ray with a larger --object-store-memory, or lower data.window_megabytes"
        found = f"Ray's object store can't hold the job's windows. {told}"
        return Finding("shared memory", "warn", found, advice)
    shm = f"/dev/shm {_size(min(sizes))} or more, " if sizes else "no /dev/shm, "
    store = f"Ray's object store {_size(max(stores, default=0))} or less"
    return Finding("shared memory", "pass", shm + store)


def _staging(facts: Facts) -> Finding:
    few, lines = [], []
    for node, each in _answering(facts):
        needed, disk = facts.needs.staging_bytes_on(node), each.staging
        told = f"{node.name}: {_size(disk.free_bytes)} free at {disk.folder}"
        told += f", a checkpoint needs {_size(needed)}" * (needed > 0)
        lines.append((disk.free_bytes, told))
        if disk.free_bytes < needed:
            few.append(told)
    if few:
        advice = "set checkpoints.local_folder to a larger local disk, on all nodes"
        return Finding("checkpoint disk", "fail", "; ".join(few), advice)
    return Finding("checkpoint disk", "pass", min(lines)[1])


def _ray_temp(facts: Facts) -> Finding:
    free = sorted(
        (each.ray_temp.free_bytes / max(1, each.ray_temp.total_bytes), node.name, each.ray_temp)
        for node, each in _answering(facts)
    )
    told = [
        f"{name}: {share:.0%} of {_size(disk.total_bytes)} free at {disk.folder}"
        for share, name, disk in free
    ]
    least = free[0][0]
    if least >= RAY_LITTLE_FREE:
        return Finding("Ray's disk", "pass", told[0])
    few = [line for line, (share, _, _) in zip(told, free, strict=True) if share < RAY_LITTLE_FREE]
    verdict: Verdict = "fail" if least <= RAY_FULL else "warn"
    advice = "make room, or start Ray with --temp-dir on a larger disk: with 5% free it stops"
    return Finding("Ray's disk", verdict, "; ".join(few), advice)


def _open_files(facts: Facts) -> Finding:
    limits = [(each.open_files, node.name) for node, each in _answering(facts)]
    few = [name for limit, name in limits if limit < ENOUGH_OPEN_FILES]
    least = min(limits, default=(0, ""))[0]
    if few:
        advice = f"ulimit -n {8 * ENOUGH_OPEN_FILES} before `ray start`, or nofile of the container"
        verdict: Verdict = "fail" if least < FEW_OPEN_FILES else "warn"
        return Finding("open files", verdict, f"limit {least:,} on {_names(few)}", advice)
    return Finding("open files", "pass", f"limit {least:,} or more")


def _clocks(facts: Facts) -> Finding:
    clocks = [(node.name, node.clock) for node in facts.nodes if node.clock is not None]
    if not clocks:
        return Finding("clocks", "warn", "not compared: no node answered")
    slow, fast = (choose(clocks, key=lambda each: each[1].ahead_seconds) for choose in (min, max))
    apart = fast[1].ahead_seconds - slow[1].ahead_seconds
    doubt = (fast[1].round_trip_seconds + slow[1].round_trip_seconds) / 2
    told = f"{_time(apart)} apart, known to {_time(doubt)}"
    # What the round trip leaves open is nobody's fault.
    sure = apart - doubt
    if sure < CLOCK_WARN_SECONDS:
        return Finding("clocks", "pass", told)
    told = f"{fast[0]} is {_time(apart)} ahead of {slow[0]}, known to {_time(doubt)}"
    verdict: Verdict = "fail" if sure >= CLOCK_FAIL_SECONDS else "warn"
    advice = "run chrony on all nodes: notices of preemption are absolute times, S3 checks them too"
    return Finding("clocks", verdict, told, advice)


def _ports(facts: Facts) -> Finding:
    if not facts.links:
        return Finding("ports", "warn", "not tried: no two nodes answered")
    blocked = [link for link in facts.links if link.blocked]
    if blocked:
        told = "; ".join(_told(link) for link in blocked[:NAMES_SHOWN])
        more = len(blocked) - NAMES_SHOWN
        advice = (
            "open TCP between all nodes on the whole range (security group, firewall, "
            "NetworkPolicy): gloo, NCCL and torch take any free port of it"
        )
        return Finding("ports", "fail", told + f"; {more} more" * (more > 0), advice)
    pairs = _many(len(facts.links), "connection")
    tried = [port for link in facts.links for port in link.ports]
    return Finding("ports", "pass", f"{pairs} on ports {min(tried)} to {max(tried)}")


def _told(link: Link) -> str:
    reason = next(iter(link.blocked.values()))
    ports = ", ".join(str(port) for port in link.blocked)
    return f"{link.source} to {link.target}: port {ports} ({reason})"


def _all_reduce(facts: Facts) -> Finding:
    found = facts.reduction
    if found is None:
        return Finding("all-reduce", "warn", "not tried: no node answered")
    on = f"{found.backend}, {_many(len(found.members), 'process', 'processes')} on "
    on += _many(len(set(found.members)), "node")
    if found.failures:
        told = "; ".join(f"{node}: {why}" for node, why in found.failures[:NAMES_SHOWN])
        name = "NCCL_SOCKET_IFNAME" if found.backend == "nccl" else "GLOO_SOCKET_IFNAME"
        advice = (
            f"see ports above; else set {name} on all nodes to the interface that has the node's "
            "address (a host name that means 127.0.0.1 is a frequent cause)"
        )
        if found.backend == "nccl":
            advice += ", and NCCL_DEBUG=INFO to see more"
        return Finding("all-reduce", "fail", f"{on}: {told}", advice)
    if found.bandwidth is None or found.latency_seconds is None:
        return Finding("all-reduce", "pass", f"{on}: it works; nothing to measure")
    figures = f"{found.bandwidth / GIGA:.3g} GB/s, latency {_time(found.latency_seconds)}"
    return Finding("all-reduce", "pass", f"{on}: {figures}")


def _storage(places: Sequence[Place]) -> tuple[Finding, ...]:
    if not places:
        advice = "name a job, or a place by --storage"
        return (Finding("storage", "warn", "not tried: there is no job", advice),)
    return tuple(_at(place) for place in places)


def _at(place: Place) -> Finding:
    check = f"storage: {place.key}"
    refused = [trial for trial in place.trials if trial.refused]
    if refused:
        first = refused[0]
        nodes = _names([trial.node for trial in refused])
        found = f"{place.uri}: {first.refused} failed on {nodes}: {first.reason}"
        return Finding(check, "fail", found, _storage_advice(place, first.refused))
    if place.left_behind:
        found = f"{place.uri} works, but {', '.join(place.left_behind)} can't be taken away"
        return Finding(check, "warn", found, "delete it, and allow deletion there")
    rates = [
        f"{label} {_rate(values)}"
        for label, values in (
            ("write", [trial.write_rate for trial in place.trials]),
            ("read", [trial.read_rate for trial in place.trials]),
        )
        if any(values)
    ]
    listing = max((trial.list_seconds or 0.0 for trial in place.trials), default=0.0)
    nodes = _many(len(place.trials), "node")
    found = f"{place.uri}: {', '.join([*rates, f'list {_time(listing)}'])}, from {nodes} at once"
    return Finding(check, "pass", found)


def _storage_advice(place: Place, step: str) -> str:
    if step == "see":
        return "use an object store, or a disk that all nodes mount at this path"
    if step in ("write", "delete") and place.local:
        return f"make it writable and not full, or choose another {place.key}"
    if step in ("write", "delete"):
        return (
            f"the bucket is read-only for these credentials: allow to put and delete objects, or "
            f"choose another {place.key}"
        )
    if place.key == "data.shards":
        return "run `cat-ray prepare` or `cat-ray index`, or put data.shards right"
    return "check the URI, storage.endpoint_url, and the credentials on each node"


def _answering(facts: Facts) -> list[tuple[Node, NodeFacts]]:
    return [(node, node.facts) for node in facts.nodes if node.facts is not None]


def _satisfies(version: str | None, pin: str) -> bool:
    return version is not None and SpecifierSet(pin).contains(version, prereleases=True)


def _names(names: Sequence[str]) -> str:
    if len(names) <= NAMES_SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:NAMES_SHOWN])} and {len(names) - NAMES_SHOWN} more"


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _size(count: float) -> str:
    return f"{count / GIGA:.3g} GB" if count >= GIGA else f"{count / MEGA:.3g} MB"


def _rate(values: Sequence[float | None]) -> str:
    known = [value / MEGA for value in values if value is not None]
    low, high = f"{min(known):,.0f}", f"{max(known):,.0f}"
    return f"{low} MB/s" if low == high else f"{low} to {high} MB/s"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
