"""The DeepSpeed edge: a network in a ZeRO engine, its whole state out and in by parameter name."""

import logging
import os
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from cat_ray.config import EngineSettings, Optimisation

MOMENTS = ("exp_avg", "exp_avg_sq")
EPSILON = 1e-8
PARTITIONED = 3


def choose_device() -> torch.device:
    """This worker's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Engine:
    """One network, its AdamW and its ZeRO stage.

    The gradient that DeepSpeed averages over the workers is that of the loss times their number:
    with losses that are parts of the batch's mean, this is the gradient of the whole batch.
    """

    def __init__(
        self, network: nn.Module, settings: EngineSettings, optimisation: Optimisation, width: int
    ):
        deepspeed = _import_deepspeed()
        self.zero_stage = settings.zero_stage
        self.world_size = distributed.get_world_size()
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=settings.rate(width),
            betas=optimisation.betas,
            eps=EPSILON,
            weight_decay=0.0,
        )
        self._engine: Any = deepspeed.initialize(
            model=network,
            optimizer=cast(Any, optimizer),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": optimisation.gradient_clip,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {
                    "stage": settings.zero_stage,
                    # Every parameter is partitioned, so that averages can be kept as shards.
                    "stage3_param_persistence_threshold": 0,
                },
            },
        )[0]

    @property
    def module(self) -> nn.Module:
        """The bare network."""
        return self._engine.module

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def descend(self, loss: Tensor) -> None:
        """One optimiser step on this worker's part of the loss."""
        self._engine.backward(loss * self.world_size)
        self._engine.step()

    def gradient_norm(self) -> float:
        """The global norm of the last step's gradient, before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def release(self) -> None:
        """Under ZeRO 3, drops what forward passes gathered: the shards alone are the weights.

        DeepSpeed keeps the parameters of a module whose inputs have no gradient, as the mapping
        network's, gathered after the backward pass.
        """
        if self.zero_stage == PARTITIONED:
            self._engine.empty_partition_cache()

    def weights(self) -> dict[str, Tensor]:
        """The full fp32 parameters by name, on the CPU. Every worker must call this."""
        self.release()
        return {name: self._full(parameter) for name, parameter in self.module.named_parameters()}

    def moments(self) -> dict[str, Tensor]:
        """Both Adam moments of each parameter, on the CPU. Every worker must call this."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            for moment in MOMENTS:
                if self.zero_stage == 0:
                    value = self._engine.optimizer.state[parameter][moment]
                else:
                    value = safe_get_full_optimizer_state(parameter, moment)
                found[f"{name}.{moment}"] = value.detach().cpu().clone()
        return found

    def restore(self, moments: dict[str, Tensor], steps: int, *probe: Any) -> None:
        """Puts moments and step count back into an engine made from restored weights.

        Args:
            moments: as `moments` gave them.
            steps: optimiser steps taken.
            probe: inputs of the network. A step on a zero loss makes the optimiser's state, which
                DeepSpeed builds lazily; without weight decay it moves nothing.
        """
        outputs = self._engine(*probe)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        self.descend((first * 0.0).sum())
        for name, parameter in self.module.named_parameters():
            for moment in MOMENTS:
                self._set_moment(parameter, moment, moments[f"{name}.{moment}"])
        inner = self._engine.optimizer if self.zero_stage == 0 else self._engine.optimizer.optimizer
        for state in inner.state.values():
            state["step"].fill_(steps)

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero_stage == 0:
            self._engine.optimizer.state[parameter][moment].copy_(value)
        elif self.zero_stage < PARTITIONED:
            safe_set_full_optimizer_state(parameter, self.local_part(value, parameter), moment)
        else:
            # The full form fails where a size isn't a multiple of the workers: cut it ourselves.
            part = self.local_part(value, parameter)
            safe_set_local_optimizer_state(parameter, part, moment)

    def local_part(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This worker's part of a full tensor, shaped as it holds the parameter."""
        own = local_values(parameter)
        if self.zero_stage < PARTITIONED:
            return value.to(own.device)
        padded = torch.zeros(own.numel() * self.world_size, device=own.device)
        padded[: value.numel()] = value.flatten()
        return padded.view(self.world_size, -1)[distributed.get_rank()].view_as(own)

    def _full(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == PARTITIONED):
            return parameter.detach().cpu().clone()


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
