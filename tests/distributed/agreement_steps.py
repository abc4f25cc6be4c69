"""Run by test_agreement.py in each process: what all of them find out together."""

import json
import sys
import time
from pathlib import Path

import torch
from torch import distributed

from cat_ray.training.agreement import Agreement

STEPS = 4
# Which wishes each rank has in each step.
WISHES = {
    0: [(False, False, False), (True, False, False), (False, False, True), (False, False, False)],
    1: [(False, False, False), (False, True, False), (False, False, True), (True, False, False)],
}


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    agreement, found = Agreement(), {}

    def figures(step: int) -> dict[str, torch.Tensor]:
        value = torch.tensor(10.0**step * (rank + 1), requires_grad=True)
        # Others in each step, and of any precision.
        return {"loss": value, f"of-step-{step}": value.to(torch.bfloat16) / 2}

    found["before"] = agreement.settle()

    def after_step(figures: dict[str, torch.Tensor], wishes: tuple[bool, ...]) -> tuple:
        agreement.send(figures)
        return agreement.after_step(wishes)

    found["steps"] = [after_step(figures(s), WISHES[rank][s]) for s in range(STEPS)]
    found["settled"] = [agreement.settle(), agreement.settle()]
    found["afterwards"] = [after_step(figures(s), (False,)) for s in range(2)]
    broken = {"loss": torch.tensor(float("nan") if rank else 1.0)}
    agreement.send(broken)
    found["broken"] = str(agreement.settle())
    # Without a figure or a wish there is nothing to add up.
    found["nothing"] = after_step({"loss": torch.ones(())}, ())
    # A save waits for its own step's figures as well.
    agreement.send(figures(1))
    found["both"] = agreement.settle()
    found["any"] = [agreement.any(rank == 1), agreement.any(False)]
    found["gathered"] = agreement.gather({"rank": rank, "parts": [rank] * rank})

    if rank:
        time.sleep(0.2)
        (folder / "late").touch()
    agreement.barrier()
    found["late"] = (folder / "late").exists()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
