"""What a failure that came through Ray was caused by: its own texts end with advice for developers.

An exception that Ray hands on may lie in several others, and of a group of workers each has its
own: one ran out of memory, the others only lost their peer. Nothing here imports Ray.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from cat_ray.errors import last_line
from cat_ray.training.watchdog import EXIT_STALLED

LONGEST = 300


class Kind(IntEnum):
    """What went wrong; of several failures the least explains the others."""

    GPU_MEMORY = 0
    MEMORY = 1
    STALL = 2
    DISK = 3
    OTHER = 4
    NODE = 5
    KILLED = 6
    PEER = 7


@dataclass(frozen=True)
class Cause:
    """Why something failed.

    Attributes:
        kind: of failure.
        text: one line.
    """

    kind: Kind
    text: str


FEWER_AT_ONCE = (
    "lower optimisation.micro_batch_lanes, set optimisation.activation_checkpointing to true"
)
TRAINING_ADVICE = {
    Kind.GPU_MEMORY: f"{FEWER_AT_ONCE}, or raise zero_stage or offload of optimisation.generator "
    "and optimisation.discriminator; `cat-ray plan` shows what fits",
    Kind.MEMORY: "raise workers.cpus_per_worker, so that fewer workers share a machine, or lower "
    f"data.window_megabytes; without a GPU or with offload also {FEWER_AT_ONCE}",
    Kind.STALL: "raise workers.stall_seconds if a step may take longer; the stacks of a stalled "
    "worker lie in the run's folder, in stacks/",
    Kind.KILLED: "if it was the kernel, for want of memory (`dmesg` there tells): raise "
    "workers.cpus_per_worker, so that fewer workers share a machine, or lower "
    "optimisation.micro_batch_lanes",
}
TASK_ADVICE = {
    Kind.GPU_MEMORY: "use a GPU with more memory",
    Kind.MEMORY: "raise the CPUs that each process takes in the workers section, so that fewer "
    "share a machine, or use machines with more memory",
    Kind.KILLED: "if it was the kernel, for want of memory (`dmesg` there tells): raise the CPUs "
    "that each process takes in the workers section, so that fewer share a machine",
}
DISK_ADVICE = "free space in Ray's temporary folder (/tmp/ray if none is set); `df` tells"

_NODE = re.compile(r"\bip: (\S+?),?\s", re.IGNORECASE)
_MEMORY_USED = re.compile(r"was (\S+) (?:used )?/ (\S+)")
_EXIT_CODE = re.compile(r"exit code (-?\d+)")
_GPU_MEMORY = re.compile(r"(?:CUDA|HIP) out of memory(?:\. Tried to allocate ([\d.]+ \w+))?")
_HOST_MEMORY = re.compile(r"can't allocate memory|bad_alloc|Cannot allocate memory|^MemoryError")
_PEER = re.compile(
    r"Connection (?:closed|reset) by (?:peer|remote)|Broken pipe|/gloo/|NCCL|ProcessGroup"
    r"|Socket Timeout"
)
_TRACEBACK = re.compile(r"^Traceback |\(pid=\d+, ip=", re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


def inner_errors(error: BaseException) -> Iterator[BaseException]:
    """An exception and those within it, as Ray Train, Ray's tasks and `raise ... from` keep them.

    Of a task's it is the exception that the task raised: around it is text for developers. So it is
    of a worker that doesn't answer Ray Train.
    """
    failures = [
        *getattr(error, "worker_failures", {}).values(),
        *filter(None, [getattr(error, "controller_failure", None)]),
    ]
    waiting: list[BaseException | None] = [error.__cause__, *failures] if failures else [error]
    seen: set[int] = set()
    while waiting:
        inner = waiting.pop()
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        waiting.append(inner.__cause__)
        raised = getattr(inner, "cause", None) or getattr(inner, "health_check_failure", None)
        if isinstance(raised, BaseException):
            waiting.append(raised)
        else:
            yield inner


def cause_of(error: BaseException, stalled: bool = False) -> Cause:
    """What caused a failure.

    Args:
        error: that Ray, or something that it called, raised.
        stalled: whether a worker is known to have ended itself because its step stalled, of which
            Ray knows nothing.
    """
    found = [_cause(inner) for inner in inner_errors(error)]
    if stalled:
        found.append(Cause(Kind.STALL, "no training step ended within workers.stall_seconds"))
    return min(found, key=lambda cause: cause.kind)


def described(error: BaseException, advice: dict[Kind, str], stalled: bool = False) -> str:
    """What caused a failure and what to do about it, in one line.

    Args:
        error: see `cause_of`.
        advice: what to do, by kind.
        stalled: see `cause_of`.
    """
    cause = cause_of(error, stalled)
    told = {Kind.DISK: DISK_ADVICE, **advice}.get(cause.kind)
    return f"{cause.text}: {told}" if told else cause.text


def _cause(error: BaseException) -> Cause:
    text = _COLOUR.sub("", str(error))
    names = {kind.__name__ for kind in type(error).__mro__}
    by_ray = any(kind.__module__.startswith("ray.") for kind in type(error).__mro__)
    where = f" on {found[1]}" if (found := _NODE.search(text)) else ""
    if found := _GPU_MEMORY.search(text):
        asked = f" ({found[1]} more were asked for)" if found[1] else ""
        return Cause(Kind.GPU_MEMORY, f"a GPU ran out of memory{asked}")
    if by_ray and ("OutOfMemoryError" in names or "node running low on memory" in text):
        used = f" ({found[1]} of {found[2]})" if (found := _MEMORY_USED.search(text)) else ""
        return Cause(Kind.MEMORY, f"Ray ended a process because memory ran out{where}{used}")
    if "MemoryError" in names or _HOST_MEMORY.search(text):
        return Cause(Kind.MEMORY, f"memory ran out ({_short(error, text)})")
    if names & {"WorkerHealthCheckTimeoutError", "NCCLHangError", "CollectiveTimeoutError"}:
        return Cause(Kind.STALL, "a worker stalled: it didn't answer within workers.stall_seconds")
    if names & {"ObjectStoreFullError", "OutOfDiskError"}:
        return Cause(Kind.DISK, "there is no room left for what Ray's processes hand on")
    if by_ray and (found := _EXIT_CODE.search(text)):
        if int(found[1]) == EXIT_STALLED:
            return Cause(Kind.STALL, "no training step ended within workers.stall_seconds")
        return Cause(Kind.KILLED, f"a process of Ray's ended with exit code {found[1]}{where}")
    if by_ray and ("NodeDiedError" in names or "its node has died" in text):
        return Cause(Kind.NODE, f"a machine of the cluster went away{where}")
    if "WorkerCrashedError" in names or (by_ray and "connection error code" in text):
        return Cause(Kind.KILLED, f"a process of Ray's was killed, or crashed{where}")
    if "RayActorError" in names and not _TRACEBACK.search(text):
        return Cause(Kind.KILLED, f"a process of Ray's ended before its work{where}")
    if "RuntimeError" in names and _PEER.search(text):
        return Cause(Kind.PEER, f"a worker lost its peers ({_short(error, text)})")
    return Cause(Kind.OTHER, _short(error, text, by_ray))


def _short(error: BaseException, text: str, by_ray: bool = False) -> str:
    """The line of an exception's text that says most."""
    if _TRACEBACK.search(text):
        line = last_line(text)
    else:
        line = text.strip().split("\n")[0].strip()
        # Ray's next sentence is advice.
        line = re.split(r"(?<=[a-z0-9])\. (?=[A-Z])", line)[0] if by_ray else line
        line = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
