"""What leaving workers hand over is saved by those that stay, with everything in it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cat_ray.checkpoint.read import CheckpointReader, newest_sound
from cat_ray.storage import locate

SCRIPT = Path(__file__).with_name("hand_over_steps.py")


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_the_checkpoint_is_whole_though_half_the_workers_are_gone(
    zero_stage: int, tiny_job: str, tmp_path: Path, run_group: Callable[..., None]
) -> None:
    stages = f"{{zero_stage: {zero_stage}}}"
    job = tiny_job.replace(
        "ema_decays: [0.9, 0.5]",
        f"ema_decays: [0.9], generator: {stages}, discriminator: {stages}",
    )
    (tmp_path / "job.yaml").write_text(job)
    run_group(SCRIPT, 4, str(tmp_path))
    whole, saved_by_others = (newest_sound(locate(str(tmp_path / n))) for n in ("all", "staying"))
    assert whole is not None and saved_by_others is not None
    expected, found = CheckpointReader(whole), CheckpointReader(saved_by_others)
    groups = {piece.group for piece in expected.manifest.slices}
    assert groups == {piece.group for piece in found.manifest.slices}
    for group in groups:
        tensors = found.tensors(group)
        for name, value in expected.tensors(group).items():
            assert torch.equal(tensors[name], value), (group, name)
    assert found.state == expected.state
