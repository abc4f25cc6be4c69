"""Run by test_engines.py in each process: the same steps through DeepSpeed, set up in many ways."""

import json
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import distributed, nn

from cat_ray.checkpoint.layout import State
from cat_ray.checkpoint.write import CheckpointWriter
from cat_ray.config import Config, dump, parse
from cat_ray.storage import Location, locate
from cat_ray.training.draws import draw_step
from cat_ray.training.engines import local_values
from cat_ray.training.lanes import micro_batches
from cat_ray.training.reals import Reals
from cat_ray.training.state import TrainingState, make_state, state_slices
from cat_ray.training.steps import MicroBatch, discriminator_step, generator_step

CPU = torch.device("cpu")


def holds_gradient(network: nn.Module) -> bool:
    """Whether any parameter has a gradient."""
    gradients = [parameter.grad for parameter in network.parameters()]
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def step(state: TrainingState, config: Config, images, labels, at: int) -> dict[str, bool]:
    """One D and G step on this process's lanes; what leaked."""
    size = config.optimisation.lane_size
    generator, discriminator = state.adversaries.generator, state.adversaries.discriminator
    parts = []
    optimisation = config.optimisation
    world_size, rank = distributed.get_world_size(), distributed.get_rank()
    lanes = micro_batches(optimisation.lanes, world_size, rank, optimisation.micro_batch_lanes)
    for each in lanes:
        own = slice(each.start * size, each.stop * size)
        draws, last = draw_step(config, each, at, CPU), each == lanes[-1]
        parts.append(MicroBatch(Reals(images[own], images[own]), labels[own], draws, last))
    with torch.set_grad_enabled(len(parts) == 1):
        fakes = [generator(part.draws.latents, part.labels) for part in parts]
    before = held(generator.module)
    for part, outputs in zip(parts, fakes, strict=True):
        discriminator_step(state.adversaries, part, outputs.detach())
    leaks = {"generator": holds_gradient(generator.module)}
    leaks["generator moved"] = differs(before, held(generator.module))
    before = held(discriminator.module)
    for part, outputs in zip(parts, fakes, strict=True):
        again = len(parts) > 1
        generator_step(
            state.adversaries,
            part,
            generator(part.draws.latents, part.labels) if again else outputs,
        )
    leaks["discriminator"] = holds_gradient(discriminator.module)
    leaks["discriminator moved"] = differs(before, held(discriminator.module))
    state.averages.update()
    return leaks


def held(network: nn.Module) -> list[torch.Tensor]:
    """What this process holds of the weights: under ZeRO 3 nothing can be gathered in a step."""
    return [local_values(parameter).clone() for parameter in network.parameters()]


def differs(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def save(state: TrainingState, run: Location, images: int) -> None:
    """All processes save; on return the checkpoint is complete."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    writer = CheckpointWriter(run, "3f9a1c", rank, world_size)
    config = dump(state.adversaries.config)
    writer.save(State(images, 0, "", config, {}), state_slices(state))
    writer.wait()
    distributed.barrier()


def main() -> None:
    folder, steps, settings = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    start_from = sys.argv[4] if len(sys.argv) > 4 else None
    distributed.init_process_group("gloo")
    text = (folder / "job.yaml").read_text()
    batches = safetensors.torch.load_file(folder / "batches.safetensors")
    for setting, changes in settings.items():
        config = parse(text, "job", changes)
        checkpoint = locate(start_from) if start_from else None
        state = make_state(config, CPU, checkpoint)
        first = steps if start_from else 0
        leaks = [
            step(state, config, batches["images"][at], batches["labels"][at], at)
            for at in range(first, first + steps)
        ]
        name = f"{'resumed-' if start_from else ''}{distributed.get_world_size()}-{setting}"
        save(state, locate(str(folder / name)), (first + steps) * config.optimisation.batch_size)
        if distributed.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(leaks))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
