"""The DeepSpeed edge: a network in a ZeRO engine, its whole state out and in by parameter name."""

import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn

from cat_ray.config import EngineSettings, Optimisation
from cat_ray.training.parts import part

MOMENTS = ("exp_avg", "exp_avg_sq")
EPSILON = 1e-8
# 200 MB: DeepSpeed's 5e8 would take 2 GB of each engine and hold any of our networks, so that
# nothing would be reduced before the backward pass is over.
BUCKET_ELEMENTS = 50_000_000
PARTITIONED = 3


def choose_device() -> torch.device:
    """This worker's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass(frozen=True)
class Fragment:
    """A run of one flattened parameter: views of its fp32 master and moments, `[length]` each."""

    name: str
    shape: tuple[int, ...]
    offset: int
    master: Tensor
    moments: dict[str, Tensor]

    @property
    def length(self) -> int:
        """Elements."""
        return self.master.numel()


class Engine:
    """One network, its AdamW and its ZeRO stage.

    The gradient that DeepSpeed averages over the workers is that of the loss times their number:
    with losses that are parts of the batch's mean, this is the gradient of the whole batch.
    `before_step` is called when the gradient is known and the weights are about to change.
    """

    def __init__(
        self, network: nn.Module, settings: EngineSettings, optimisation: Optimisation, width: int
    ):
        self.zero_stage = settings.zero_stage
        self.world_size = distributed.get_world_size()
        self.before_step: Callable[[], None] = lambda: None
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optimisation.gradient_clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": settings.zero_stage,
                # Every parameter is partitioned, so that averages can be kept as shards.
                "stage3_param_persistence_threshold": 0,
                # A bucket is reduced while the gradients of the next one are computed.
                "overlap_comm": True,
                "reduce_bucket_size": BUCKET_ELEMENTS,
                **_offload(settings),
            },
        }
        deepspeed = _import_deepspeed()
        optimizer = cast(Any, adamw(network, settings, optimisation, width))
        # It loads an optimiser that is compiled where it is defined, and the compiler with it.
        with patch.object(torch, "compile", lambda function: function):
            self._engine: Any = deepspeed.initialize(
                model=network, optimizer=optimizer, config=config
            )[0]

    @property
    def module(self) -> nn.Module:
        """The bare network."""
        return self._engine.module

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def descend(self, loss: Tensor, last: bool = True) -> None:
        """Adds the gradient of a micro-batch's part of the loss; the last one's makes the step."""
        self._engine.set_gradient_accumulation_boundary(last)
        with part("backward"):
            self._engine.backward(loss * self.world_size)
        if last:
            self.before_step()
        with part("optimiser"):
            self._engine.step()

    def gradient_norm(self) -> Tensor:
        """This worker's part of the global norm of the last step's gradient, before clipping.

        Every worker knows the norm: the parts add up to it, as those of the other figures do.
        """
        norm = self._engine.get_global_grad_norm()
        value = torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32)
        return value.to(self._engine.device) / self.world_size

    def release(self) -> None:
        """Under ZeRO 3, drops what forward passes gathered: the shards alone are the weights.

        DeepSpeed keeps the parameters of a module whose inputs have no gradient, as the mapping
        network's, gathered after the backward pass.
        """
        if self.zero_stage == PARTITIONED:
            self._engine.empty_partition_cache()

    def fragments(self) -> list[Fragment]:
        """What this worker holds of the optimiser's state, in the order of the parameters."""
        named = self.module.named_parameters()
        return [
            f for name, parameter in named if (f := self._fragment(name, parameter)) is not None
        ]

    def own(self, fragment: Fragment) -> range:
        """Which elements of a fragment are this worker's to save, so that all save each once."""
        length = fragment.length
        if self.zero_stage > 0:
            return range(length)
        rank = distributed.get_rank()
        return range(length * rank // self.world_size, length * (rank + 1) // self.world_size)

    def steps(self) -> int:
        """Optimiser steps taken: under ZeRO, DeepSpeed skips one whose gradient is not finite.

        Waits for the device.
        """
        return int(next(iter(self._adam_states()))["step"])

    def restore(self, moments: Callable[[str, int, int], Tensor], steps: int, *probe: Any) -> None:
        """Puts moments and step count back into an engine made from restored weights.

        Args:
            moments: from `<parameter>.<moment>`, offset and length to that run of elements.
            steps: optimiser steps taken.
            probe: inputs of the network. A step on a zero loss makes the optimiser's state, which
                DeepSpeed builds lazily; without weight decay it moves nothing.
        """
        outputs = self._engine(*probe)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        self.descend((first * 0.0).sum())
        for fragment in self.fragments():
            for moment, values in fragment.moments.items():
                name = f"{fragment.name}.{moment}"
                values.copy_(moments(name, fragment.offset, fragment.length))
        for state in self._adam_states():
            state["step"].fill_(steps)

    def _adam_states(self) -> Iterable[dict[str, Tensor]]:
        """What Adam knows of each tensor that it moves; all took the same steps."""
        inner = self._engine.optimizer if self.zero_stage == 0 else self._engine.optimizer.optimizer
        return inner.state.values()

    def _fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        if self.zero_stage == PARTITIONED:
            return self._partition(name, parameter)
        shape = tuple(parameter.shape)
        if self.zero_stage == 0:
            state = self._engine.optimizer.state[parameter]
            moments = {moment: state[moment].view(-1) for moment in MOMENTS}
            return Fragment(name, shape, 0, parameter.detach().view(-1), moments)
        # Stages 1 and 2 cut the parameters, put end to end, into a piece for each worker.
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        moments = {moment: mapping.get_optim_state_fragment(moment) for moment in MOMENTS}
        start = mapping.lp_fragment_address.start
        return Fragment(name, shape, start, mapping.get_hp_fragment(), moments)

    def _partition(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        # Not by DeepSpeed's safe_get_local_*: of what is offloaded they make copies on the GPU.
        zero = self._engine.optimizer
        group, start, held = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        values = flat.detach()[start : start + held]
        shape = tuple(cast(Any, parameter).ds_shape)
        offset = distributed.get_rank() * values.numel()
        # The last worker's partition is padded, and where a parameter is small some have nothing.
        length = min(values.numel(), math.prod(shape) - offset)
        if length <= 0:
            return None
        moments = {
            moment: zero.optimizer.state[flat][moment][start : start + length] for moment in MOMENTS
        }
        return Fragment(name, shape, offset, values[:length], moments)


def adamw(
    network: nn.Module, settings: EngineSettings, optimisation: Optimisation, width: int
) -> torch.optim.AdamW:
    """The optimiser of a network of this width."""
    return torch.optim.AdamW(
        network.parameters(),
        lr=settings.rate(width),
        betas=optimisation.betas,
        eps=EPSILON,
        weight_decay=0.0,
        fused=True,
    )


def _offload(settings: EngineSettings) -> dict[str, Any]:
    """DeepSpeed's settings of what is held in the host's memory."""
    place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    offload: dict[str, Any] = {}
    if settings.offload != "none":
        offload["offload_optimizer"] = place
    if settings.offload == "all":
        offload["offload_param"] = place
    return offload


def local_values(parameter: nn.Parameter) -> Tensor:
    """What this worker holds of a parameter: its flat shard under ZeRO 3, else all of it."""
    return getattr(parameter, "ds_tensor", parameter.data)


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Only its inference all-reduce would need this op, and building it would need a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
    return deepspeed
