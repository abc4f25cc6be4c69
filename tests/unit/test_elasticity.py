"""How many workers run, where, and which ends of theirs a run survives; without a cluster."""

import inspect
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import ray
from ray._private.label_utils import validate_label_selector
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    _AutoscalingCoordinatorActor,
)
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError
from ray.train import FailureConfig, ScalingConfig
from ray.train.constants import TRAIN_ENV_VARS
from ray.train.torch import TorchTrainer
from ray.train.v2._internal import constants
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupState
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from cat_ray.data.stream import CPUS_PER_READ, NODE_ID
from cat_ray.errors import (
    BadInput,
    Damaged,
    GaveWay,
    RunFailed,
    StorageDown,
    StorageFull,
    Unfinished,
)
from cat_ray.training import elasticity
from cat_ray.training.elasticity import (
    HEAD,
    Budgets,
    ElasticTrainer,
    GroupClock,
    RayDrain,
    Scaling,
    TerminationSignal,
    environment,
    on_head_node,
    told_to_user,
)
from cat_ray.training.preemption import Notice, NoticeBoard
from cat_ray.training.requests import ask_to_resize

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE
BROKEN = RuntimeError("Connection closed by peer")
TOLD = (
    BadInput("no such shard"),
    GaveWay("resize", "the number of nodes changed"),
    RunFailed("rolled back 4 times"),
    Unfinished("too few nodes"),
    StorageDown("s3://b/k doesn't answer"),
    StorageFull("no space left for s3://b/k"),
    Damaged("a.tar is cut off"),
)


def group_error(*failures: Exception) -> WorkerGroupError:
    """What Ray Train makes of the exceptions of a group's workers."""
    return WorkerGroupError("told by Ray", dict(enumerate(failures)))


def in_task(error: Exception) -> RayTaskError:
    """An exception as it comes out of an actor or a task."""
    return RayTaskError("work", "Traceback ...", error, ip="127.0.0.1")


def chained(error: Exception) -> Exception:
    """Another exception that was raised from this one."""
    try:
        raise RuntimeError("reading failed") from error
    except RuntimeError as outer:
        return outer


# The environment.


def test_ray_train_reads_what_it_is_told():
    read = constants.ENV_VARS_TO_PROPAGATE | TRAIN_ENV_VARS
    told = environment(7.5, 300.0)
    assert told.keys() <= read
    assert all(isinstance(value, str) for value in told.values())
    assert told[constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR] == "7.5"
    assert told[constants.WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] == "300.0"


def test_only_the_two_limits_are_the_configurations():
    one, other = environment(1.0, 2.0), environment(3.0, 4.0)
    assert one.keys() == other.keys()
    assert len([name for name in one if one[name] != other[name]]) == 2


# What a failure tells the user.


@pytest.mark.parametrize("error", TOLD, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda error: error,
        group_error,
        lambda error: group_error(BROKEN, error, BROKEN),
        lambda error: group_error(error, BROKEN),
        lambda error: group_error(in_task(error)),
        lambda error: group_error(BROKEN, chained(error)),
        lambda error: group_error(chained(in_task(chained(error)))),
        chained,
        in_task,
        ControllerError,
        lambda error: ControllerError(in_task(error)),
        lambda error: ControllerError(chained(chained(error))),
        lambda error: chained(in_task(chained(error))),
    ],
)
def test_what_is_told_to_the_user_is_found_wherever_it_lies(wrap, error):
    assert told_to_user(wrap(error)) is error


def test_what_ray_data_adds_for_developers_is_left_out():
    error = BadInput("shard 3 doesn't exist\nFailed to apply UDF transform after 1/1 attempts.")
    assert str(told_to_user(group_error(in_task(error)))) == "shard 3 doesn't exist"


@pytest.mark.parametrize(
    "error",
    [
        BROKEN,
        group_error(BROKEN, chained(BROKEN)),
        group_error(),
        group_error(WorkerHealthCheckFailedError("gone", ActorDiedError())),
        ControllerError(WorkerGroupStartupTimeoutError(2)),
        PreemptionError(PreemptionInfo(None, {"a": [0]})),
    ],
)
def test_other_failures_tell_the_user_nothing(error):
    assert told_to_user(error) is None


# Which ends are survived.


class Run:
    """The newest checkpoint of a run, as the budgets ask for it."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self) -> int:
        return self.images


def budgets(
    max_failures: int = 0, run: Run | None = None, max_preemptions: int | None = None
) -> Budgets:
    return Budgets(FailureConfig(max_failures=max_failures), run or Run(), max_preemptions)


@pytest.mark.parametrize("cause", ["resize", "roll-back", "preemption"])
def test_giving_way_is_free(cause):
    policy = budgets()
    ways = [GaveWay(cause, "told"), GaveWay(cause, "told")]
    assert [policy.make_decision(group_error(*ways)) for _ in range(50)] == [RETRY] * 50
    # Nor is it charged to the failures afterwards.
    assert budgets(max_failures=1).make_decision(group_error(BROKEN)) is RETRY


def test_giving_way_leaves_the_failures_as_many_as_they_were():
    policy = budgets(max_failures=1)
    ends = [
        group_error(GaveWay("resize", "told")),
        group_error(BROKEN),
        group_error(GaveWay("roll-back", "told")),
        group_error(BROKEN),
    ]
    assert [policy.make_decision(end) for end in ends] == [RETRY, RETRY, RETRY, RAISE]


def test_a_group_gave_way_though_some_of_its_workers_have_not_said_so_yet():
    error = WorkerGroupError("told by Ray", {3: GaveWay("resize", "told")})
    assert budgets().make_decision(error) is RETRY


@pytest.mark.parametrize("cause", ["resize", "roll-back", "preemption", "stop"])
def test_a_group_of_which_one_failed_has_failed(cause):
    failures = [GaveWay(cause, "told"), BROKEN]
    policy = budgets(max_failures=1)
    assert policy.make_decision(group_error(*failures)) is RETRY
    assert policy.make_decision(group_error(*failures[::-1])) is RAISE


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_preemptions_are_counted_and_nothing_else_is_with_them(limit):
    policy = budgets(max_failures=100, max_preemptions=limit)
    others = [GaveWay("resize", "told"), GaveWay("roll-back", "told"), BROKEN]
    for place in range(limit):
        assert policy.make_decision(group_error(others[place])) is RETRY
        assert policy.make_decision(group_error(GaveWay("preemption", "told"))) is RETRY
    assert policy.make_decision(group_error(GaveWay("preemption", "told"))) is RAISE


def test_preemptions_are_never_forgiven():
    run = Run()
    policy = budgets(run=run, max_preemptions=2)
    ends = []
    for run.images in (0, 32, 64):
        ends.append(policy.make_decision(group_error(GaveWay("preemption", "told"))))
    assert ends == [RETRY, RETRY, RAISE]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stop_is_the_end(workers):
    error = group_error(*[GaveWay("stop", "asked to stop")] * workers)
    assert budgets(max_failures=100).make_decision(error) is RAISE


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_failures_in_a_row_are_counted(limit):
    policy = budgets(max_failures=limit)
    ends = [policy.make_decision(group_error(BROKEN, BROKEN)) for _ in range(limit + 1)]
    assert ends == [RETRY] * limit + [RAISE]


@pytest.mark.parametrize(
    ("checkpoints", "expected"),
    [
        # Images at the newest checkpoint at each failure; one failure is allowed.
        ([0, 0], [RETRY, RAISE]),
        ([32, 32], [RETRY, RAISE]),
        ([0, 32, 64, 96, 96], [RETRY, RETRY, RETRY, RETRY, RAISE]),
        ([32, 0], [RETRY, RAISE]),
        ([64, 96, 64], [RETRY, RETRY, RAISE]),
        ([0, 32, 32], [RETRY, RETRY, RAISE]),
    ],
)
def test_failures_are_forgiven_once_there_is_a_newer_checkpoint(checkpoints, expected):
    run = Run()
    policy, ends = budgets(max_failures=1, run=run), []
    for run.images in checkpoints:
        ends.append(policy.make_decision(group_error(BROKEN)))
    assert ends == expected


def test_a_worker_that_was_killed_is_a_failure():
    policy = budgets(max_failures=1)
    killed = group_error(WorkerHealthCheckFailedError("gone", ActorDiedError()), BROKEN)
    assert [policy.make_decision(killed) for _ in range(2)] == [RETRY, RAISE]


@pytest.mark.parametrize("error", [TOLD[0], *TOLD[2:]], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "wrap",
    [
        group_error,
        lambda error: group_error(BROKEN, in_task(error)),
        ControllerError,
        lambda error: ControllerError(chained(error)),
    ],
)
def test_what_no_restart_mends_ends_the_run_at_once(wrap, error):
    assert budgets(max_failures=-1).make_decision(wrap(error)) is RAISE


def test_a_group_that_could_not_start_is_tried_again_at_no_cost():
    policy = budgets(max_failures=1)
    late = ControllerError(WorkerGroupStartupTimeoutError(2))
    assert [policy.make_decision(late) for _ in range(20)] == [RETRY] * 20
    assert policy.make_decision(group_error(BROKEN)) is RETRY


def test_other_mistakes_of_the_controller_end_the_run():
    assert budgets(max_failures=100).make_decision(ControllerError(BROKEN)) is RAISE


# How many workers, and where.


class Clock:
    """Seconds as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Remote:
    """A method of an actor, called as the true one; `ray.get` of the answer is the answer."""

    def __init__(self, true: Callable[..., object], answer: Callable[..., object]):
        self._signature = inspect.signature(true)
        self._answer = answer

    def remote(self, *arguments: object, **named: object) -> object:
        bound = self._signature.bind(None, *arguments, **named)
        bound.arguments.pop("self")
        return self._answer(**bound.arguments)


class FakeRay:
    """What Ray tells of a cluster: nodes, those that drain, and what its coordinator gives away."""

    def __init__(self, answering_port: int, silent_port: int):
        self._answering, self._silent = answering_port, silent_port
        self.nodes: list[dict[str, Any]] = []
        self.draining: dict[str, int] = {}
        self.reserved: dict[str, dict[str, float]] | None = None
        self.asked: list[dict[str, object]] = []
        self.late = False

    def node(self, name: str, cpus: float, answers: bool = True, alive: bool = True) -> None:
        port = self._answering if answers else self._silent
        self.nodes.append(
            {
                "NodeID": name,
                "Alive": alive,
                "NodeManagerAddress": "127.0.0.1",
                "NodeManagerPort": port,
                "Resources": {"CPU": cpus, "memory": 1e9},
            }
        )

    def cpus(self) -> dict[str, dict[str, float]]:
        return {n["NodeID"]: {"CPU": n["Resources"]["CPU"]} for n in self.nodes if n["Alive"]}

    def get_reserved_resources(self, **arguments: object) -> dict[str, dict[str, float]]:
        self.asked.append(arguments)
        return self.cpus() if self.reserved is None else self.reserved

    def get(self, answer: Any, *, timeout: float) -> Any:
        assert timeout > 0
        if self.late:
            raise GetTimeoutError
        return answer

    def client(self) -> Any:
        """The client of the coordinator, as Ray Train gives it to a policy."""
        client = create_autospec(TrainAutoscalingCoordinatorClient, instance=True)
        client._autoscaling_coordinator = SimpleNamespace(
            get_reserved_resources=Remote(
                _AutoscalingCoordinatorActor.get_reserved_resources, self.get_reserved_resources
            )
        )
        return client


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    """A port that somebody listens on, and one that nobody does."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as bound:
        # Bound, so that nobody else gets it, but not listening.
        bound.bind(("127.0.0.1", 0))
        yield server.getsockname()[1], bound.getsockname()[1]


@pytest.fixture
def cluster(ports, monkeypatch) -> FakeRay:
    fake = FakeRay(*ports)
    nodes = create_autospec(ray.nodes, side_effect=lambda: list(fake.nodes))
    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(ray, "get", fake.get)
    state = create_autospec(ray._private.state.state, instance=True)
    state.get_draining_nodes.side_effect = lambda: dict(fake.draining)
    monkeypatch.setattr(ray._private.state, "state", state)
    return fake


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(elasticity, "time", clock)
    return clock


@pytest.fixture
def scaling(cluster, clock) -> Callable[..., Scaling]:
    """Makes the policy as Ray Train does; each decision comes after the answers before it aged."""

    class Aged(Scaling):
        def _usable(self) -> Any:
            clock.now += 2 * self.GET_RESERVED_RESOURCES_INTERVAL_S
            return super()._usable()

    def make(
        workers: tuple[int, int] = (1, 8),
        cpus: float = 1.0,
        capacity_seconds: float | None = None,
        **others: Any,
    ) -> Scaling:
        policy = Aged(
            ScalingConfig(
                num_workers=workers,
                elastic_resize_monitor_interval_s=0.0,
                resources_per_worker={"CPU": cpus, **others.pop("resources", {})},
                **others,
            ),
            capacity_seconds,
        )
        policy._requester_id = "train-1"
        policy._coordinator_client = cluster.client()
        return policy

    return make


def workers_of(decision: object) -> int | None:
    """How many workers a decision starts, None for none."""
    if isinstance(decision, NoopDecision):
        return None
    assert isinstance(decision, ResizeDecision)
    return decision.num_workers


def start(policy: Scaling) -> int | None:
    return workers_of(policy.make_decision_for_non_running_worker_group())


@pytest.mark.parametrize(
    ("nodes", "cpus", "workers", "expected"),
    [
        ([2, 2], 1.0, (1, 8), 3),
        ([4], 1.0, (1, 8), 3),
        ([2, 2], 2.0, (1, 8), 1),
        ([2, 2], 1.5, (1, 8), 2),
        ([2, 2], 1.75, (1, 8), 2),
        ([4.5], 1.0, (1, 8), 4),
        ([4.25], 1.0, (1, 8), 3),
        # Beyond the largest group there is room.
        ([2, 2], 1.0, (1, 3), 3),
        ([8, 8], 1.0, (1, 4), 4),
        ([2], 1.0, (1, 8), 1),
        # What is left is too little for the smallest group.
        ([2], 1.0, (2, 8), None),
        ([1], 1.0, (1, 8), None),
        ([1, 1, 1, 1], 1.0, (4, 4), None),
    ],
)
def test_a_group_leaves_a_place_for_reading(cluster, scaling, nodes, cpus, workers, expected):
    for place, size in enumerate(nodes):
        cluster.node(f"node-{place}", size)
    started = start(scaling(workers, cpus))
    assert started == expected
    if started is not None:
        assert sum(nodes) - started * cpus >= CPUS_PER_READ


def test_a_group_that_takes_no_cpu_leaves_them_all_for_reading(cluster, scaling):
    cluster.node("a", 0.25)
    cluster.reserved = {"a": {"CPU": 0.25, "GPU": 4.0}}
    policy = scaling(cpus=0.0, use_gpu=True, resources={"GPU": 1})
    assert start(policy) == 4


def test_with_all_nodes_well_the_coordinator_is_asked_for_a_fresh_count(cluster, scaling):
    cluster.node("a", 4)
    cluster.node("b", 4)
    # Somebody else's run holds the other node.
    cluster.reserved = {"a": {"CPU": 4.0}}
    assert start(scaling()) == 4
    assert cluster.asked == [{"requester_id": "train-1", "recompute": True}]


@pytest.mark.parametrize("draining", [{"b": 0}, {"b": 99_000}])
def test_a_draining_node_is_not_counted(cluster, scaling, draining):
    for name in "abc":
        cluster.node(name, 2)
    policy = scaling(cpus=1.5)
    assert start(policy) == 3
    cluster.draining = draining
    assert start(policy) == 2
    cluster.draining = {}
    assert start(policy) == 3


def test_a_node_that_does_not_answer_is_not_counted(cluster, scaling):
    cluster.node("a", 2)
    cluster.node("b", 2, answers=False)
    cluster.node("c", 2)
    assert start(scaling(cpus=1.5)) == 2


def test_a_node_that_ray_knows_to_be_dead_is_neither_asked_nor_counted(cluster, scaling):
    cluster.node("a", 2)
    cluster.node("b", 2, answers=False, alive=False)
    policy = scaling(cpus=1.5)
    assert start(policy) == 1
    assert selector(policy) is None


def test_when_all_nodes_are_going_there_is_no_group(cluster, scaling):
    cluster.node("a", 4, answers=False)
    cluster.node("b", 4)
    cluster.draining = {"b": 0}
    assert start(scaling()) is None


def selector(policy: Scaling) -> dict[str, str] | None:
    """What Ray Train's controller asks for before it starts a group."""
    told = policy.on_controller_start_worker_group(
        scaling_config=policy.scaling_config, num_workers=1
    )
    assert validate_label_selector(told) is None
    return told


def test_a_new_group_is_kept_off_nodes_that_do_not_answer(cluster, scaling):
    gone = ["c" * 56, "a" * 56]
    for name in gone:
        cluster.node(name, 2, answers=False)
    cluster.node("b" * 56, 2)
    policy = scaling()
    assert selector(policy) is None
    start(policy)
    assert selector(policy) == {NODE_ID: f"!in({'a' * 56},{'c' * 56})"}
    # One of them is back, the other is known to be dead by now.
    cluster.nodes.clear()
    cluster.node("a" * 56, 2)
    cluster.node("b" * 56, 2)
    cluster.node("c" * 56, 2, answers=False, alive=False)
    start(policy)
    assert selector(policy) is None


def test_the_label_of_a_node_is_rays_own():
    assert NODE_ID == ray._raylet.RAY_NODE_ID_KEY


def test_nodes_are_looked_at_no_more_often_than_the_coordinator_is_asked(cluster, scaling):
    cluster.node("a", 4)
    policy = scaling()
    assert start(policy) == 3
    looks = ray.nodes.call_count
    # The answer is new still.
    policy._latest_reserved_resources_query_time = elasticity.time.monotonic()
    assert start(policy) == 3
    assert ray.nodes.call_count == looks


# Waiting for nodes.


def test_a_run_waits_as_long_as_asked_for_and_is_then_unfinished(cluster, scaling, clock):
    cluster.node("a", 2)
    policy = scaling((2, 4), capacity_seconds=60.0)
    assert start(policy) is None
    began = clock.now
    clock.now = began + 55
    assert start(policy) is None
    clock.now = began + 61
    with pytest.raises(Unfinished, match=r"workers.minimum 2 for 6\d s: run the same command"):
        start(policy)


def test_without_a_limit_a_run_waits_for_ever(cluster, scaling, clock):
    policy = scaling((2, 4))
    for _ in range(5):
        assert start(policy) is None
        clock.now += 1e6


def test_each_wait_has_the_whole_time(cluster, scaling, clock):
    policy = scaling((1, 4), capacity_seconds=60.0)
    for _ in range(4):
        cluster.nodes.clear()
        assert start(policy) is None
        clock.now += 50
        assert start(policy) is None
        cluster.node("a", 4)
        assert start(policy) == 3
        clock.now += 1000


def test_a_coordinator_that_does_not_answer_is_waited_for(cluster, scaling, clock):
    cluster.node("a", 4)
    cluster.late = True
    policy = scaling(capacity_seconds=60.0)
    assert start(policy) is None
    cluster.late = False
    assert start(policy) == 3


# A group that runs.


class Worker:
    """A worker as the controller knows it: what it was asked to execute."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.actor = SimpleNamespace(execute=Remote(RayTrainWorker.execute, self._execute))

    def _execute(self, fn: object) -> None:
        self.asked.append(fn)


def running(policy: Scaling, count: int) -> tuple[object, list[list[object]]]:
    """The decision for a group of so many workers, and what each of them was asked."""
    group: Any = [Worker() for _ in range(count)]
    nobody: Any = None
    state = WorkerGroupState(0.0, nobody, group, nobody)
    decision = policy.make_decision_for_running_worker_group(state, nobody)
    return decision, [worker.asked for worker in group]


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_a_group_of_another_size_than_there_is_room_for_is_asked_and_never_ended(
    cluster, scaling, count
):
    for name in "abc":
        cluster.node(name, 2)
    decision, asked = running(scaling(cpus=1.5), count)
    assert isinstance(decision, NoopDecision)
    assert asked == [[ask_to_resize]] * count


def test_a_group_as_large_as_there_is_room_for_is_left_alone(cluster, scaling):
    for name in "abc":
        cluster.node(name, 2)
    decision, asked = running(scaling(cpus=1.5), 3)
    assert isinstance(decision, NoopDecision)
    assert asked == [[], [], []]


@pytest.mark.parametrize("change", ["drains", "is gone", "is new"])
def test_a_group_is_asked_when_a_node_drains_goes_or_comes(cluster, scaling, change):
    cluster.node("a", 2)
    cluster.node("b", 2, answers=change != "is gone")
    if change == "is new":
        cluster.node("c", 2)
    if change == "drains":
        cluster.draining = {"b": 0}
    _, asked = running(scaling(cpus=1.5), 2)
    assert asked == [[ask_to_resize]] * 2


def test_a_group_that_would_fall_below_the_smallest_goes_on_as_it_is(cluster, scaling):
    cluster.node("a", 2)
    cluster.node("b", 2)
    cluster.draining = {"b": 0}
    decision, asked = running(scaling((2, 4), cpus=1.5), 2)
    assert isinstance(decision, NoopDecision)
    assert asked == [[], []]


# Ports.


def address(port: int) -> dict[str, Any]:
    return {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}


def test_a_raylet_answers_while_its_port_takes_connections(ports):
    listening, closed = ports
    assert elasticity._answers(address(listening))
    assert not elasticity._answers(address(closed))


def test_a_raylet_that_ends_answers_no_longer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert elasticity._answers(address(port))
    assert not elasticity._answers(address(port))


def test_a_host_that_has_no_address_does_not_answer():
    node = {"NodeManagerAddress": "no-such-host.invalid", "NodeManagerPort": 1}
    assert not elasticity._answers(node)


# What Ray Train is given.


def test_the_trainer_hands_both_policies_to_the_controller(monkeypatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        TorchTrainer,
        "_initialize_and_run_controller",
        lambda self, **parts: given.update(parts) or "result",
    )
    run = Run()
    trainer = ElasticTrainer(
        print,
        progress=run,
        capacity_seconds=60.0,
        max_preemptions=2,
        scaling_config=ScalingConfig(num_workers=(1, 2)),
    )
    parts = {"scaling_policy": "Ray's", "failure_policy": "Ray's", "callbacks": []}
    assert trainer._initialize_and_run_controller(**parts) == "result"
    assert given.keys() == parts.keys() <= inspect.signature(TrainController).parameters.keys()
    assert isinstance(given["scaling_policy"], Scaling)
    assert isinstance(given["failure_policy"], Budgets)
    preempted = [given["failure_policy"].make_decision(group_error(GaveWay("preemption", "told")))]
    assert preempted == [RETRY]


def test_ctrl_c_stays_the_drivers():
    before = signal.getsignal(signal.SIGINT)
    trainer = ElasticTrainer(
        print,
        progress=Run(),
        capacity_seconds=None,
        max_preemptions=None,
        scaling_config=ScalingConfig(num_workers=1),
    )
    trainer._register_sigint_handler(None)
    assert signal.getsignal(signal.SIGINT) is before


# What Ray tells a worker.


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (None, None),
        (PreemptionInfo(90_000, {"a": [0, 2]}), None),
        (PreemptionInfo(90_500, {"a": [0], "b": [1]}), Notice("Ray drains this node", 90.5)),
        (PreemptionInfo(None, {"b": [1]}), Notice("Ray drains this node", None)),
        (PreemptionInfo(0, {"b": [1]}), Notice("Ray drains this node", None)),
    ],
)
def test_a_drain_is_a_notice_for_the_workers_on_the_node(monkeypatch, info, expected):
    context = SimpleNamespace(preemption_context=PreemptionContext(info))
    monkeypatch.setattr(elasticity, "get_train_context", lambda: context)
    assert RayDrain(1).poll() == expected


def test_a_sigterm_is_a_notice_and_not_the_end(monkeypatch):
    board = NoticeBoard()
    monkeypatch.setattr(elasticity, "NOTICES", board)
    before = signal.getsignal(signal.SIGTERM)
    try:
        TerminationSignal().after_init_train_context()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert board.current() == Notice("SIGTERM", None)


def test_the_clock_of_a_group_is_set_before_it_starts(monkeypatch):
    monkeypatch.setattr(GroupClock, "began", 0.0)
    context: Any = None
    before = time.time()
    GroupClock().before_worker_group_start(context)
    assert before <= GroupClock.began <= time.time()


@pytest.mark.parametrize(("here", "expected"), [("head", True), ("a", False)])
def test_the_drivers_node_is_the_one_with_the_clusters_head(cluster, monkeypatch, here, expected):
    cluster.node("a", 2)
    cluster.node("head", 0)
    cluster.nodes[1]["Resources"][HEAD] = 1.0
    context = SimpleNamespace(get_node_id=lambda: here)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    assert on_head_node() is expected
