"""What is wrong with single nodes, or differs between them. Pure."""

from collections import Counter, defaultdict

from packaging.specifiers import SpecifierSet

from cat_ray.doctor.facts import Facts
from cat_ray.doctor.finding import Finding, Verdict, answering
from cat_ray.doctor.wording import counted, in_bytes, listed

# With so much free Ray's raylet stops writing objects (`local_fs_capacity_threshold`).
RAY_FULL, RAY_LITTLE_FREE = 0.05, 0.10
# Ray's own limits, in ray/_private/worker.py.
FEW_OPEN_FILES, ENOUGH_OPEN_FILES = 4096, 8192
KUBERNETES_SHM = "in Kubernetes mount an emptyDir of medium Memory there, in Docker use --shm-size"


def answers(facts: Facts) -> Finding:
    """Whether a process starts on every node."""
    gpus, cpus = (sum(getattr(n, what) for n in facts.nodes) for what in ("gpus", "cpus"))
    count = f"{counted(len(facts.nodes), 'node')}, {cpus:g} CPUs and {gpus:g} GPUs by Ray's count"
    silent = [node for node in facts.nodes if node.facts is None]
    if not silent:
        return Finding("nodes", "pass", count)
    told = "; ".join(f"{node.name}: {node.silence}" for node in silent)
    advice = "no process starts there: is cat-ray installed, is the disk full, is the node alive?"
    return Finding("nodes", "fail", f"{count}; no answer from {told}", advice)


def versions(facts: Facts) -> Finding:
    """Whether all nodes have the versions that the package asks for, and the same ones."""
    answers = answering(facts)
    wrong, installs, builds = [], [], []
    for package in dict.fromkeys(name for _, each in answers for name in each.versions):
        pin = facts.pins.get(package, "")
        by_version: dict[str | None, list[str]] = defaultdict(list)
        for node, each in answers:
            by_version[each.versions.get(package)].append(node.name)
        unpinned = any(not _satisfies(version, pin) for version in by_version)
        groups = {version and version.partition("+")[0] for version in by_version}
        told = ", ".join(
            f"{version or 'none'} on {listed(names)}" for version, names in by_version.items()
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


def gpus(facts: Facts) -> Finding:
    """Whether torch can use the GPUs that Ray counts, and the job has some."""
    answers = answering(facts)
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
    told = (
        f"{counted(count, 'GPU')} on {counted(on, 'node')}, torch and Ray agree"
        if count
        else "none"
    )
    return Finding("GPUs", "pass", told)


def tools(facts: Facts) -> Finding:
    """Whether DeepSpeed can build what it builds at first use."""
    answers = answering(facts)
    lacking = {
        "ninja": [node.name for node, each in answers if each.ninja is None],
        "a C++ compiler": [node.name for node, each in answers if each.compiler is None],
    }
    missing = [f"no {what} on {listed(names)}" for what, names in lacking.items() if names]
    if missing:
        advice = "apt-get install g++ ninja-build (or pip install ninja, on PATH) in the image"
        found = f"{', '.join(missing)}: DeepSpeed builds an operator at first use"
        return Finding("build tools", "fail", found.replace("no a ", "no "), advice)
    pairs = Counter(f"{each.ninja}, {each.compiler}" for _, each in answers)
    return Finding("build tools", "pass", "; ".join(pairs))


def shared_memory(facts: Facts) -> Finding:
    """Whether Ray's objects, and the job's windows among them, fit into shared memory."""
    small, tight, sizes, stores = [], [], [], []
    for node, each in answering(facts):
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
        told = "; ".join(
            f"{name}: {in_bytes(has)} of {in_bytes(least)}" for name, has, least in small
        )
        advice = f"make /dev/shm as large as Ray's object store; {KUBERNETES_SHM}"
        found = f"/dev/shm is too small, Ray keeps objects on disk. {told}"
        return Finding("shared memory", "fail", found, advice)
    if tight:
        told = "; ".join(
            f"{name}: {in_bytes(has)} of {in_bytes(least)}" for name, has, least in tight
        )
        advice = "start Ray with a larger --object-store-memory, or lower data.window_megabytes"
        found = f"Ray's object store can't hold the job's windows. {told}"
        return Finding("shared memory", "warn", found, advice)
    shm = f"/dev/shm {in_bytes(min(sizes))} or more, " if sizes else "no /dev/shm, "
    store = f"Ray's object store {in_bytes(max(stores, default=0))} or less"
    return Finding("shared memory", "pass", shm + store)


def staging(facts: Facts) -> Finding:
    """Whether a checkpoint's parts have room until they are uploaded."""
    few, lines = [], []
    for node, each in answering(facts):
        needed, disk = facts.needs.staging_bytes_on(node), each.staging
        told = f"{node.name}: {in_bytes(disk.free_bytes)} free at {disk.folder}"
        told += f", a checkpoint needs {in_bytes(needed)}" * (needed > 0)
        lines.append((disk.free_bytes, told))
        if disk.free_bytes < needed:
            few.append(told)
    if few:
        advice = "set checkpoints.local_folder to a larger local disk, on all nodes"
        return Finding("checkpoint disk", "fail", "; ".join(few), advice)
    return Finding("checkpoint disk", "pass", min(lines)[1])


def ray_temp(facts: Facts) -> Finding:
    """Whether Ray can write to its own disk."""
    free = sorted(
        (each.ray_temp.free_bytes / max(1, each.ray_temp.total_bytes), node.name, each.ray_temp)
        for node, each in answering(facts)
    )
    told = [
        f"{name}: {share:.0%} of {in_bytes(disk.total_bytes)} free at {disk.folder}"
        for share, name, disk in free
    ]
    least = free[0][0]
    if least >= RAY_LITTLE_FREE:
        return Finding("Ray's disk", "pass", told[0])
    few = [line for line, (share, _, _) in zip(told, free, strict=True) if share < RAY_LITTLE_FREE]
    verdict: Verdict = "fail" if least <= RAY_FULL else "warn"
    advice = "make room, or start Ray with --temp-dir on a larger disk: with 5% free it stops"
    return Finding("Ray's disk", verdict, "; ".join(few), advice)


def open_files(facts: Facts) -> Finding:
    """Whether a process may have as many files open as Ray wants."""
    limits = [(each.open_files, node.name) for node, each in answering(facts)]
    few = [name for limit, name in limits if limit < ENOUGH_OPEN_FILES]
    least = min(limits, default=(0, ""))[0]
    if few:
        advice = f"ulimit -n {8 * ENOUGH_OPEN_FILES} before `ray start`, or nofile of the container"
        verdict: Verdict = "fail" if least < FEW_OPEN_FILES else "warn"
        return Finding("open files", verdict, f"limit {least:,} on {listed(few)}", advice)
    return Finding("open files", "pass", f"limit {least:,} or more")


def _satisfies(version: str | None, pin: str) -> bool:
    return version is not None and SpecifierSet(pin).contains(version, prereleases=True)
