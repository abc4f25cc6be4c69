"""Training in plain PyTorch, one process without Ray and DeepSpeed, to measure ours against.

A program: `python -m cat_ray.operations.plain_training ORDER STEPS` takes the resolved job from its
standard input, and writes `StepTimes` as JSON.
"""

import json
import sys
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn

from cat_ray.config import Config, EngineSettings, Optimisation, parse
from cat_ray.operations.reference_step import reference_step
from cat_ray.operations.step_times import (
    StepTimes,
    measure_matmul,
    measure_steps,
    steps_on_random_data,
)
from cat_ray.training.engines import adamw, choose_device
from cat_ray.training.parts import part
from cat_ray.training.process import set_threads
from cat_ray.training.state import TrainingState, make_state
from cat_ray.training.steps import training_step

ORDERS = {"fused": training_step, "reference": reference_step}


class PlainEngine:
    """What an engine does, in a few lines of PyTorch."""

    zero_stage = 0

    def __init__(
        self, network: nn.Module, settings: EngineSettings, optimisation: Optimisation, width: int
    ):
        self.module = network
        self._clip = optimisation.gradient_clip
        self._norm = torch.zeros(())
        self._optimizer = adamw(network, settings, optimisation, width)

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def descend(self, loss: Tensor, last: bool = True) -> None:
        """Adds the gradient of a micro-batch's part of the loss; the last one's makes the step."""
        with part("backward"):
            loss.backward()
        if not last:
            return
        with part("optimiser"):
            self._norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
            self._optimizer.step()
            self._optimizer.zero_grad()

    def gradient_norm(self) -> Tensor:
        """The global norm of the last step's gradient, before clipping."""
        return self._norm


def plain_state(config: Config, device: torch.device) -> TrainingState:
    """The weights that a run starts from, in plain engines."""
    return make_state(config, device, None, cast(Any, PlainEngine))


def plain_steps(config: Config, order: str, steps: int) -> StepTimes:
    """Measures steps of one order, on the whole batch, with the threads of one of our workers.

    The reference order is not compiled, as its networks are not.
    """
    if order == "reference":
        eager = config.optimisation.model_copy(update={"compile": False})
        config = config.model_copy(update={"optimisation": eager})
    set_threads(config.workers)
    device = choose_device()
    peak = measure_matmul() if device.type == "cpu" else 0.0
    take = steps_on_random_data(config, plain_state(config, device), device, ORDERS[order])
    return measure_steps(take, device, steps, peak)


if __name__ == "__main__":
    job = parse(sys.stdin.read(), "the job")
    print(json.dumps(asdict(plain_steps(job, sys.argv[1], int(sys.argv[2])))))
