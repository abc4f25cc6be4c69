"""Run by test_loop.py in each process: trains runs with bad steps in them, without Ray.

Where a worker group gives way, the next one goes on as the driver would let it.
"""

import gc
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import distributed

from cat_ray.checkpoint.read import newest_sound, read_state
from cat_ray.config import Config, parse
from cat_ray.data.index import Index, Shard
from cat_ray.data.order import Stream
from cat_ray.data.read import Batch
from cat_ray.data.stream import Due, reading_of
from cat_ray.errors import GaveWay
from cat_ray.storage import locate
from cat_ray.training.faults import Injector
from cat_ray.training.lanes import share
from cat_ray.training.loop import train
from cat_ray.training.session import Session
from cat_ray.training.steps import MicroBatch

MOST_GROUPS = 4


class SessionWithBadSteps(Session):
    """In the steps that end at `bad` images, on the last worker and with the first noise, `how`:

    reals: an image is NaN, and with it both losses and both gradients.
    penalty: noise of the penalty is NaN: the discriminator's alone.
    gradient: one of the generator's gradients is NaN, and at ZeRO 0 no figure tells.
    """

    bad: tuple[int, ...] = ()
    how = "reals"
    _hook: Any = None

    def micro_batches(self, batch: Batch) -> list[MicroBatch]:
        made = super().micro_batches(batch)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        alone = distributed.get_rank() == distributed.get_world_size() - 1
        ends = self.images + self.config.optimisation.batch_size
        if not alone or self.noise_stream or ends not in self.bad:
            return made
        first, *others = made
        if self.how == "reals":
            reals = replace(first.reals, images=first.reals.images * torch.nan)
            first = replace(first, reals=reals)
        elif self.how == "penalty":
            noise = [each * torch.nan for each in first.draws.noise_real]
            first = replace(first, draws=replace(first.draws, noise_real=noise))
        else:
            parameter = next(self.adversaries.generator.module.parameters())
            self._hook = parameter.register_hook(lambda gradient: gradient * torch.nan)
        return [first, *others]


def batches(config: Config, start: int, lanes: range) -> Iterator[Batch]:
    """This worker's part of every batch still due, the same ones in each run."""
    size, total = config.optimisation.batch_size, config.run.total_images
    lane_size = config.optimisation.lane_size
    own = slice(lanes.start * lane_size, lanes.stop * lane_size)
    side = config.model.resolution
    for images in range(start, total, size):
        random = np.random.default_rng(images)
        content = random.integers(0, 256, (size, side, side, 1), dtype=np.uint8)
        labels = random.integers(0, config.data.num_classes, size)
        none = np.array([""] * size, object)
        yield Batch(content[own], labels[own], none[own], none[own])


def session_of(config: Config, number: int, roll_backs: int) -> SessionWithBadSteps:
    """The session of a worker group, from the newest checkpoint."""
    run = locate(config.run.folder)
    found = newest_sound(run)
    distributed.barrier()
    side, optimisation = config.model.resolution, config.optimisation
    index = Index("images", side, 1, (16,), "", (Shard("train.tar", 16, 1, ""),), "")
    start = read_state(found).images if found else 0
    lanes = share(optimisation.lanes, distributed.get_world_size(), distributed.get_rank())
    due = Due(
        stream=Stream(0, (16,), 16, optimisation.batch_size, optimisation.lanes),
        start=start,
        stop=config.run.total_images,
        window_bytes=16,
        checkpoint=found.uri if found else None,
        # Six hexadecimal digits, as every name of a checkpoint ends.
        worker_group=f"{number:06x}",
        began=0.0,
        noise_stream=roll_backs,
        gone_nodes=(),
        index=index,
        reading=reading_of(config, index, run),
    )
    stream: Any = SimpleNamespace(
        due=due, lanes=lanes, batches=lambda: batches(config, start, lanes)
    )
    return SessionWithBadSteps(config, stream, "session", Injector(run, (), 0))


def ends_of_groups(config: Config, bad: Sequence[int], how: str) -> list[list]:
    """Trains to the end of the run: each worker group's first and last images, and how it ended."""
    ends: list[list] = []
    for number in range(MOST_GROUPS):
        roll_backs = len([end for *_, end in ends if end == "roll-back"])
        session = session_of(config, number, roll_backs)
        session.bad, session.how = tuple(bad), how
        start, end = session.images, "finished"
        try:
            train(session)
        except GaveWay as gave_way:
            end = gave_way.cause
        session.__exit__(None, None, None)
        distributed.barrier()
        # DeepSpeed collects garbage with every engine: what is loaded by now is none.
        gc.freeze()
        ends.append([start, session.images, end])
        if end == "finished":
            break
    return ends


def copy_checkpoints(run: Path, to: Path, images: int) -> None:
    """Copies a run's checkpoints of up to so many images."""
    for state in run.glob("checkpoints/*/state.json"):
        if json.loads(state.read_text())["images"] <= images:
            shutil.copytree(state.parent, to / "checkpoints" / state.parent.name)


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    text = (folder / "job.yaml").read_text()
    for case in json.loads(sys.argv[2]):
        run, again = folder / case["name"], folder / f"{case['name']}-again"
        for place, bad in ((run, case["bad"]), (again, ())):
            if place == again and rank == 0:
                copy_checkpoints(run, again, case["again_from"])
            distributed.barrier()
            config = parse(text, "job", (*case["changes"], f"run.folder={place}"))
            ends = ends_of_groups(config, bad, case["how"])
            Path(f"{place}.{rank}.json").write_text(json.dumps(ends))
            if case["again_from"] is None:
                break
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
