"""What Ray Train's elasticity leaves out; the only place that reaches into its internals.

Ray Train counts nodes from a view that is up to 40 s old, ends a healthy group without a word when
it resizes it, and charges a group that gave way by itself to the failures. Here it looks anew at
every decision, leaves draining nodes out, asks the group to save before it is resized, and charges
each end to the right budget.
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.core.generated import autoscaler_pb2
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from cat_ray.data.stream import CPUS_PER_READ, elsewhere
from cat_ray.errors import ExpectedError, GaveWay, Unfinished
from cat_ray.ray_errors import inner_errors
from cat_ray.stop_signals import heed_again
from cat_ray.storage_errors import no_space_left
from cat_ray.training.preemption import Notice
from cat_ray.training.requests import NOTICES, ask_to_resize

ANSWER_SECONDS = 5.0
PROBE_SECONDS = 1.0
PROBES = 32
HEAD = "node:__internal_head__"
# Ray Data's words for developers begin so; it puts them behind those of an exception.
RAY_DATA_ADVICE = "\nFailed to apply UDF transform"

# Ray Train doesn't hand this on: it goes into the environment of the whole job. Workers whose peer
# has died can't end their process group in good order.
JOB_ENVIRONMENT = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1"}
for _name, _value in JOB_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


def environment(start_seconds: float, stall_seconds: float) -> dict[str, str]:
    """What Ray Train reads in the driver, and hands on to its controller and workers."""
    return {
        # A failed worker is noticed within this time, and each worker is asked as often.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(stall_seconds),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_seconds),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }


def told_to_user(error: BaseException) -> BaseException | None:
    """What a failure tells the user somewhere inside, if it does: a foreseen end, or that it gave
    way."""
    gave_way: GaveWay | None = None
    for inner in inner_errors(error):
        if isinstance(inner, ExpectedError):
            inner.args = (str(inner).split(RAY_DATA_ADVICE)[0],)
            return inner
        if isinstance(inner, OSError) and (full := no_space_left(inner)):
            return full
        if isinstance(inner, GaveWay):
            gave_way = inner
    return gave_way


class ElasticTrainer(TorchTrainer):
    """Ray Train's trainer with our two policies.

    Args:
        progress: images at the newest checkpoint: failures before it are forgiven.
        capacity_seconds: see the configuration; as the next one.
        max_preemptions: likewise.
        arguments: of `TorchTrainer`.
    """

    def __init__(
        self,
        *arguments: Any,
        progress: Callable[[], int],
        capacity_seconds: float | None,
        max_preemptions: int | None,
        **named: Any,
    ):
        super().__init__(*arguments, **named)
        self._progress = progress
        self._capacity_seconds = capacity_seconds
        self._max_preemptions = max_preemptions

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        parts["scaling_policy"] = Scaling(self.scaling_config, self._capacity_seconds)
        parts["failure_policy"] = Budgets(
            self.run_config.failure_config, self._progress, self._max_preemptions
        )
        return super()._initialize_and_run_controller(**parts)

    def _register_sigint_handler(self, controller: Any) -> None:
        # The driver's own handlers stop a run with a checkpoint.
        del controller


class Scaling(ElasticScalingPolicy):
    """Counts nodes as they are now, without those that are about to go; resizes with a save.

    Attributes:
        gone: nodes that didn't answer when they were last asked; the controller's own knowledge.
    """

    gone: tuple[str, ...] = ()

    def __init__(self, scaling_config: Any, capacity_seconds: float | None):
        super().__init__(scaling_config)
        self._capacity_seconds = capacity_seconds
        self._waiting_since: float | None = None
        self._usable_nodes: dict[str, dict[str, float]] = {}
        Scaling.gone = ()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """How many workers to start now.

        Raises:
            Unfinished: there were too few for as long as the configuration waits.
        """
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, ResizeDecision):
            self._waiting_since = None
            return decision
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        waited = now - self._waiting_since
        if self._capacity_seconds is not None and waited > self._capacity_seconds:
            raise Unfinished(
                f"there were too few nodes for workers.minimum {self.scaling_config.min_workers} "
                f"for {waited:.0f} s: run the same command again when there are more"
            )
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Never ends a group: asks its workers to save and give way instead."""
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if isinstance(decision, ResizeDecision):
            for worker in worker_group_state.workers:
                worker.actor.execute.remote(ask_to_resize)
        return NoopDecision()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """As many as there is room for, with a place left for reading data."""
        count = super()._count_possible_workers(reserved_resources)
        cpus = self.scaling_config._resources_per_worker_not_none.get("CPU", 0.0)
        usable = sum(node.get("CPU", 0.0) for node in self._usable_nodes.values())
        # A group that took every CPU would wait for its data for ever.
        while count and cpus and usable - count * cpus < CPUS_PER_READ:
            count -= 1
        return count

    def on_controller_start_worker_group(
        self, *, scaling_config: Any, num_workers: int
    ) -> dict[str, str] | None:
        """Keeps a new group off nodes that Ray has not yet noticed to be gone."""
        del scaling_config, num_workers
        return elsewhere(Scaling.gone).get("label_selector")

    def _get_reserved_resources(self) -> Any:
        now = time.monotonic()
        waited = now - self._latest_reserved_resources_query_time
        if waited >= self.GET_RESERVED_RESOURCES_INTERVAL_S:
            self._latest_reserved_resources_query_time = now
            self._latest_reserved_resources = self._usable()
        return self._latest_reserved_resources

    def _usable(self) -> dict[str, dict[str, float]] | None:
        """Resources by node, without nodes that are draining or don't answer."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        draining = ray._private.state.state.get_draining_nodes()  # pyright: ignore
        with ThreadPoolExecutor(PROBES) as pool:
            answers = list(pool.map(_answers, alive))
        Scaling.gone = tuple(
            sorted(node["NodeID"] for node, up in zip(alive, answers, strict=True) if not up)
        )
        self._usable_nodes = {
            node["NodeID"]: node["Resources"]
            for node in alive
            if node["NodeID"] not in Scaling.gone and node["NodeID"] not in draining
        }
        if draining or Scaling.gone:
            return self._usable_nodes
        recompute = True
        try:
            return ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(
                    self._requester_id, recompute
                ),
                timeout=ANSWER_SECONDS,
            )
        except ray.exceptions.RayError:
            # The next decision asks again.
            return None


def _answers(node: dict[str, Any]) -> bool:
    """Whether a node's raylet takes connections: Ray itself may need 20 s to find that out."""
    try:
        with socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=PROBE_SECONDS
        ):
            return True
    except OSError:
        return False


class Budgets(DefaultFailurePolicy):
    """Which ends of a worker group the run survives, and how many of each."""

    def __init__(
        self, failure_config: Any, progress: Callable[[], int], max_preemptions: int | None
    ):
        super().__init__(failure_config)
        self._progress = progress
        self._max_preemptions = max_preemptions
        self._images_at_failure = 0
        self._gave_way_to_preemption = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Goes on after giving way; failures count only until the next checkpoint."""
        told = told_to_user(training_failed_error)
        if isinstance(told, ExpectedError):
            # Storage that is down was waited for, before it was told.
            return FailureDecision.RAISE
        if isinstance(training_failed_error, WorkerGroupError):
            failures = training_failed_error.worker_failures.values()
            if isinstance(told, GaveWay) and all(isinstance(f, GaveWay) for f in failures):
                return self._after_giving_way(told)
            images = self._progress()
            if images > self._images_at_failure:
                self._images_at_failure, self._worker_group_failures = images, 0
        return super().make_decision(training_failed_error)

    def _after_giving_way(self, end: GaveWay) -> FailureDecision:
        if end.cause == "stop":
            return FailureDecision.RAISE
        if end.cause == "preemption":
            self._gave_way_to_preemption += 1
            limit = self._max_preemptions
            if limit is not None and self._gave_way_to_preemption > limit:
                return FailureDecision.RAISE
        return FailureDecision.RETRY


class GroupClock(WorkerGroupCallback):
    """Knows, in the controller, when the start of the present worker group began."""

    began = 0.0

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """See Ray Train."""
        del worker_group_context
        GroupClock.began = time.time()


class TerminationSignal(WorkerCallback):
    """Makes of a SIGTERM to a worker process a notice instead of its end."""

    def after_init_train_context(self) -> None:
        """See Ray Train, which calls this in the process's main thread."""
        signal.signal(signal.SIGTERM, lambda *_: NOTICES.post(Notice("SIGTERM", None)))
        heed_again()


class RayDrain:
    """Asks what Ray Train was told of a drain of this worker's node."""

    def __init__(self, rank: int):
        self._rank = rank

    def poll(self) -> Notice | None:
        """The drain as a notice, or None."""
        info = get_train_context().preemption_context.preemption_info
        if info is None or self._rank not in info.preempted_ranks:
            return None
        deadline = info.deadline_ms / 1000 if info.deadline_ms else None
        return Notice("Ray drains this node", deadline)


def on_head_node() -> bool:
    """Whether this process shares its node with the cluster's head, and so with the driver."""
    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and HEAD in node["Resources"] for node in ray.nodes())


def drain_node(node_id: str, reason: str, deadline: float | None) -> None:
    """Tells Ray that a node is about to go, as its autoscaler does: nothing new is placed there.

    Args:
        node_id: the node; it may be drained already.
        reason: for Ray's log.
        deadline: unix seconds; none is known if None.
    """
    client: Any = ray._private.worker.global_worker.gcs_client  # pyright: ignore
    kind = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client.drain_node(node_id, kind, reason, int((deadline or 0.0) * 1000))
