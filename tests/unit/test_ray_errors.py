"""What a failure that came through Ray was caused by: the cause first, then keys of our own.

The long texts are Ray 2.60's own, provoked by `tests/ray/test_ray_errors.py`.
"""

import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.train.v2._internal.exceptions import (
    BroadcastCollectiveTimeoutError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cat_ray.config import parse
from cat_ray.errors import BadInput, RunFailed, StorageDown
from cat_ray.ray_errors import (
    TASK_ADVICE,
    TRAINING_ADVICE,
    Kind,
    cause_of,
    described,
    inner_errors,
)
from cat_ray.storage import Location, locate
from cat_ray.training import driver
from cat_ray.training.watchdog import LATELY_SECONDS, STACKS, has_stalled_lately

DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n"
    "\tactor_id: c4cf4eff071e48a3b99ad82c01000000\n\tpid: 9376\n\tnamespace: 3f1da2f0\n"
    "\tip: 192.0.2.2\nThe actor is dead because its worker process has died. Worker exit type: "
    "SYSTEM_ERROR Worker exit detail: "
)
KILLED = DIED + (
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes "
    "include: (1) the process was killed by the OOM killer due to high memory usage, (2) ray stop "
    "--force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another "
    "unexpected error. If the process was killed by the kernel OOM killer (verifiable by checking "
    "for OOM in dmesg of the OOMing node), consider enabling resource isolation via "
    "--enable-resource-isolation to prevent node deaths by resource contention and significant "
    "loss of progress by uninformed kernel OOM killing."
)
EXITED = DIED + "Worker exits unexpectedly. Worker exits with an exit code 75."
OUT_OF_MEMORY = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: "
    "192.0.2.2, ID: 9da8fecbda7ed40336fa71421d02601f14064a4d287103e5a3f85fdc) was 22.95GB used / "
    "23.54GB limit (0.974938)\nOOM kill reason: Memory usage 1016270848B exceeded threshold of "
    "252760624B (1.0% of 25276063744B limit)\nRay killed 1 worker(s) based on the killing policy\n"
    "Top 10 memory users: PID\tMEM(GB)\tCOMMAND\n10538\t0.10\tpython oom2.py\n"
    "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/. "
    "To adjust the kill threshold, set the environment variable `RAY_memory_usage_threshold` when "
    "starting Ray. To disable worker killing, set the environment variable "
    "`RAY_memory_monitor_refresh_ms` to zero."
)
NODE = (
    "The actor died unexpectedly before finishing this task.\n\tip: 192.0.2.2\nThe actor died "
    "because its node has died. Node Id: 527ba9e2\n\tthe actor's node was terminated unexpectedly: "
    "health check failed due to missing too many heartbeats"
)
GPU = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 5.12 MiB is free. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
PEER = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
    "[127.0.0.1]:14338"
)


def died(text: str) -> RayActorError:
    return RayActorError("c4cf", text)


def polled(error: Exception) -> WorkerHealthCheckFailedError:
    """What Ray Train makes of a worker that doesn't answer any more."""
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", error)


def in_group(*failures: Exception) -> WorkerGroupError:
    texts = [f"[Rank {rank} Error Snippet]:\n{error}" for rank, error in enumerate(failures)]
    return WorkerGroupError("\n".join(texts), dict(enumerate(failures)))


def in_task(error: Exception) -> RayTaskError:
    return RayTaskError("work", f"Traceback ...\nValueError: {error}", error, ip="127.0.0.1")


CASES = [
    (OutOfMemoryError(OUT_OF_MEMORY), Kind.MEMORY, "on 192.0.2.2 (22.95GB of 23.54GB)"),
    (MemoryError("Unable to allocate 3 GiB"), Kind.MEMORY, "memory ran out"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Kind.MEMORY, "memory ran out"),
    (torch.OutOfMemoryError(GPU), Kind.GPU_MEMORY, "(20.00 MiB more were asked for)"),
    (died(KILLED), Kind.KILLED, "was killed, or crashed on 192.0.2.2"),
    (WorkerCrashedError(), Kind.KILLED, "was killed, or crashed"),
    (ActorDiedError(), Kind.KILLED, "ended before its work"),
    (died(EXITED), Kind.STALL, "workers.stall_seconds"),
    (died(EXITED.replace("code 75", "code 1")), Kind.KILLED, "exit code 1 on 192.0.2.2"),
    (WorkerHealthCheckTimeoutError("has been hanging"), Kind.STALL, "workers.stall_seconds"),
    (BroadcastCollectiveTimeoutError(9.0, [1], 9.0), Kind.STALL, "workers.stall_seconds"),
    (died(NODE), Kind.NODE, "a machine of the cluster went away on 192.0.2.2"),
    (NodeDiedError("Task failed because the node it was running on is dead"), Kind.NODE, "went"),
    (OutOfDiskError("x"), Kind.DISK, "no room left"),
    (PEER, Kind.PEER, "lost its peers"),
    (ValueError("two\nlines"), Kind.OTHER, "ValueError: two"),
    (KeyError("x"), Kind.OTHER, "KeyError: 'x'"),
    (ZeroDivisionError(), Kind.OTHER, "ZeroDivisionError"),
    (WorkerGroupStartupTimeoutError(2), Kind.OTHER, "waiting for 2 workers"),
    (
        died(f"The actor died because {in_task(ValueError('cannot start'))}"),
        Kind.OTHER,
        "ValueError: cannot start",
    ),
]


@pytest.mark.parametrize(("error", "kind", "told"), CASES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda error: error,
        polled,
        in_task,
        in_group,
        ControllerError,
        lambda error: in_group(polled(error)),
        lambda error: in_group(PEER, error, PEER),
        lambda error: in_group(polled(died(KILLED)), in_task(error)),
        lambda error: ControllerError(in_task(error)),
    ],
)
def test_the_cause_is_told_wherever_it_lies(wrap, error, kind, told):
    cause = cause_of(wrap(error))
    if (cause.kind, kind) == (Kind.KILLED, Kind.PEER):
        # Of a peer that was killed and one that noticed it.
        return
    assert cause.kind == kind
    assert "\n" not in cause.text and "\x1b" not in cause.text
    assert told in cause.text or cause == cause_of(died(KILLED))


ADVICE_OF_OTHERS = ("RAY_", "Refer to", "documentation", "environment variable", "--enable", "Tip:")


@pytest.mark.parametrize(("error", "kind", "told"), CASES)
def test_the_advice_is_in_our_own_keys(error, kind, told):
    for advice in (TRAINING_ADVICE, TASK_ADVICE):
        message = described(in_group(polled(error), PEER), advice)
        assert not any(other in message for other in ADVICE_OF_OTHERS), message
        assert "\n" not in message and len(message) < 600
    message = described(in_group(error), TRAINING_ADVICE)
    keys = {
        Kind.GPU_MEMORY: ("micro_batch_lanes", "activation_checkpointing", "zero_stage", "offload"),
        Kind.MEMORY: ("workers.cpus_per_worker", "micro_batch_lanes", "data.window_megabytes"),
        Kind.KILLED: ("workers.cpus_per_worker", "dmesg"),
        Kind.STALL: ("workers.stall_seconds",),
    }
    assert all(key in message for key in keys.get(kind, ()))


def test_a_stall_that_ray_knows_nothing_of_is_told_before_the_death_that_it_caused():
    death = in_group(polled(died(KILLED)), PEER)
    assert cause_of(death).kind == Kind.KILLED
    assert cause_of(death, stalled=True).kind == Kind.STALL
    assert cause_of(in_group(OutOfMemoryError(OUT_OF_MEMORY)), stalled=True).kind == Kind.MEMORY


def test_every_key_of_the_advice_is_one_of_a_job():
    config = parse("run: {folder: r, total_images: 512}\ndata: {shards: s, num_classes: 1}", "x")
    sections = config.model_dump()
    for advice in TRAINING_ADVICE.values():
        for word in advice.replace(",", " ").replace(";", " ").split():
            section, dot, key = word.partition(".")
            if dot and section in sections:
                assert key in sections[section], word


@given(st.recursive(st.just(ValueError("x")), lambda inner: inner.map(in_task) | inner.map(polled)))
def test_what_lies_deep_within_is_found(error):
    assert any(isinstance(inner, ValueError) for inner in inner_errors(error))


def test_exceptions_that_caused_each_other_are_looked_at_once():
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert list(inner_errors(one)) == [one, other]


# In a run.


@pytest.fixture
def run(tmp_path) -> Location:
    return locate(str(tmp_path / "run"))


def leave_stacks(run: Location, ago: float, name: str = "-rank-0.txt") -> None:
    (run / STACKS / f"{time.time() - ago:.0f}{name}").write(b"stacks")


def test_only_stacks_that_were_left_just_now_are_of_this_end(run):
    assert not has_stalled_lately(run)
    leave_stacks(run, LATELY_SECONDS + 10)
    (run / STACKS / "mine.txt").write(b"")
    assert not has_stalled_lately(run)
    leave_stacks(run, 5)
    assert has_stalled_lately(run)


@pytest.mark.parametrize("stalled", [False, True])
def test_a_run_that_ended_for_a_stall_says_so(run, tiny_job, monkeypatch, stalled):
    def fit() -> None:
        if stalled:
            leave_stacks(run, 1)
        raise in_group(polled(died(KILLED)), PEER)

    monkeypatch.setattr(driver, "ElasticTrainer", lambda *_, **__: SimpleNamespace(fit=fit))
    monkeypatch.setattr(driver.elasticity, "environment", lambda *_: {})
    monkeypatch.setattr(driver, "keep_helpers_here", lambda: None)
    with pytest.raises(RunFailed) as caught:
        driver._fit(parse(tiny_job, "job.yaml"), run, "a", lambda: pytest.fail("starts"), ())
    told = str(caught.value)
    assert ("raise workers.stall_seconds" in told) == stalled
    assert ("was killed, or crashed on 192.0.2.2" in told) != stalled


def test_the_command_line_tells_the_cause_and_what_a_task_told(capsys):
    from cat_ray.cli.shell import speaking_plainly

    for error, told, code in (
        (OutOfMemoryError(OUT_OF_MEMORY), "Ray ended a process because memory ran out", 1),
        (in_task(BadInput("no such shard")).as_instanceof_cause(), "cat-ray: no such shard\n", 2),
        (in_task(StorageDown("away")).as_instanceof_cause(), "cat-ray: away\n", 75),
        (RayError("odd"), "unexpected RayError: odd", 1),
    ):
        with pytest.raises(BaseException) as caught, speaking_plainly():
            raise error
        assert getattr(caught.value, "exit_code", None) == code
        assert told in capsys.readouterr().err
