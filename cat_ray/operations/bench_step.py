"""`cat-ray bench step`: a step as we train, in plain PyTorch, and in the reference recipe's order.

Each repetition of each is a process of its own, and they take turns. The batch lies in memory, so
that no reading of data is measured.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from torch import distributed

from cat_ray.config import Config, dump, parse
from cat_ray.connection import connected
from cat_ray.data.stream import CPUS_PER_READ
from cat_ray.errors import BadInput, RunFailed, last_line
from cat_ray.operations.step_comparison import PLAIN, REFERENCE, Steps, ours
from cat_ray.operations.step_times import (
    COMMUNICATION,
    StepTimes,
    measure_steps,
    steps_on_random_data,
)
from cat_ray.operations.work import work_of
from cat_ray.ray_errors import TRAINING_ADVICE, described
from cat_ray.training.agreement import Agreement
from cat_ray.training.elasticity import JOB_ENVIRONMENT
from cat_ray.training.engines import choose_device
from cat_ray.training.parts import part
from cat_ray.training.process import set_threads, worker_environment
from cat_ray.training.recorder import Recorder
from cat_ray.training.state import make_state
from cat_ray.training.steps import training_step

ORDERS = {PLAIN: "fused", REFERENCE: "reference"}
COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_gather",
    "all_gather_object",
    "reduce_scatter_tensor",
    "reduce",
    "broadcast",
)
NO_WISHES = (False, False, False)


def bench_step(
    config: Config, repetitions: int, steps: int, workers: Sequence[int] = (1,)
) -> Steps:
    """Measures a job's step; the repetitions of what is compared take turns.

    Args:
        config: the job; its shards aren't needed.
        repetitions: of each way.
        steps: that each repetition times, and as many again for the parts.
        workers: how many of ours, one after the other.

    Raises:
        BadInput: more workers than lanes, or the job's teacher or VAE can't be loaded.
        RunFailed: a process failed.
    """
    lanes = config.optimisation.lanes
    if max(workers) > lanes:
        raise BadInput(f"--workers {max(workers)}: optimisation.lanes is {lanes}, use at most that")
    ways: dict[str, Callable[[], StepTimes]] = {
        **{ours(count): partial(_ours, config, steps, count) for count in workers},
        **{name: partial(_plain, config, steps, order) for name, order in ORDERS.items()},
    }
    found: dict[str, list[StepTimes]] = {name: [] for name in ways}
    needed = max(workers) * config.workers.cpus_per_worker + CPUS_PER_READ
    with connected(needed, JOB_ENVIRONMENT, reads=False):
        for _ in range(repetitions):
            for name, measure in ways.items():
                found[name].append(measure())
    # Of those that make the fakes once, if any do: more is no gain.
    operations = 2 * work_of(config, max(workers)).total * config.optimisation.batch_size
    return Steps(found, tuple(workers), config.optimisation.batch_size, operations)


def _plain(config: Config, steps: int, order: str) -> StepTimes:
    workers = config.workers
    task = _program.options(
        num_cpus=workers.cpus_per_worker,
        num_gpus=int(workers.gpu),
        runtime_env={"env_vars": worker_environment(workers)},
    )
    code, output, told = ray.get(task.remote(dump(config), order, steps))
    if code:
        raise RunFailed(f"plain PyTorch failed: {last_line(told)}")
    return StepTimes(**json.loads(output))


@ray.remote(max_retries=0)
def _program(job: str, order: str, steps: int) -> tuple[int, str, str]:
    """Runs the program on a machine that has a worker's device; the program knows no Ray."""
    command = [sys.executable, "-m", "cat_ray.operations.plain_training", order, str(steps)]
    result = subprocess.run(command, input=job, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def _ours(config: Config, steps: int, count: int) -> StepTimes:
    workers, storage = config.workers, config.storage
    folder = storage.locate(f"{config.run.folder}-bench")
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": dump(config), "steps": steps},
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=count,
            use_gpu=workers.gpu,
            resources_per_worker={
                "CPU": workers.cpus_per_worker,
                **({"GPU": 1} if workers.gpu else {}),
            },
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=folder.path,
            storage_filesystem=folder.filesystem,
            worker_runtime_env={"env_vars": worker_environment(workers)},
        ),
    )
    try:
        measured: Any = trainer.fit().return_value
    except TrainingFailedError as error:
        told = described(error, TRAINING_ADVICE)
        raise RunFailed(f"cat-ray's own step failed: {told}") from error
    finally:
        folder.delete_folder()
    return StepTimes(**measured)


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """Each worker's: what a step of training does, with figures and agreement."""
    config = parse(settings["config"], "config")
    set_threads(config.workers)
    device = choose_device()
    state = make_state(config, device, None)
    _name_communication()
    recorder = Recorder(device, config.optimisation.batch_size)
    agreement = Agreement()
    group = distributed.get_world_size(), distributed.get_rank()
    take = steps_on_random_data(config, state, device, training_step, *group)

    def step(place: int) -> None:
        figures, outputs = take(place)
        recorder.add(figures, outputs)
        agreement.send(figures)
        agreement.after_step(NO_WISHES)

    return asdict(measure_steps(step, device, settings["steps"]))


def _name_communication() -> None:
    """Makes a part of a step of every collective that DeepSpeed calls."""
    from deepspeed.comm import comm

    backend: Any = comm.cdb
    for name in COLLECTIVES:
        if hasattr(backend, name):
            setattr(backend, name, part(COMMUNICATION)(getattr(backend, name)))
