"""The generator: its published size, its stages, and that images don't mix."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_ray.model.generator import Generator, GeneratorShape
from cat_ray.model.sizes import SIZES, Size

TINY = GeneratorShape(
    size=Size(depth=8, width=16, heads=2),
    patch=2,
    resolution=8,
    channels=3,
    num_classes=3,
    latent_width=8,
)


def build(shape: GeneratorShape = TINY) -> Generator:
    torch.manual_seed(0)
    return Generator(shape)


def inputs(images: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(images, TINY.latent_width, generator=numbers), torch.arange(images) % 3


@cache
def on_meta(size: str, patch: int) -> Generator:
    with torch.device("meta"):
        return Generator(GeneratorShape(SIZES[size], patch, 32, 4, 1000))


def one_latent_and_label() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(1, 64, device="meta"), torch.empty(1, dtype=torch.long, device="meta")


@pytest.mark.parametrize(
    ("size", "millions", "head_width"),
    [
        ("S", 33.5, 64),
        ("B", 133.3, 64),
        ("M", 260.9, 64),
        ("L", 463.3, 64),
        ("XL", 682.0, 72),
        ("H", 959.8, 80),
    ],
)
def test_each_size_has_the_parameters_and_heads_of_the_size_table(size, millions, head_width):
    generator = on_meta(size, patch=2)
    # The table, like the publication, counts the fixed positions too.
    count = sum(p.numel() for p in generator.parameters()) + generator.positions.numel()
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    assert all(block.attention.query_gain.numel() == head_width for block in generator.blocks)


@pytest.mark.parametrize(("size", "operations"), [("M", 46e9), ("H", 167e9)])
def test_the_published_models_have_the_published_operations(size, operations):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta(size, patch=2)(*one_latent_and_label())
    assert counter.get_total_flops() / 2 == pytest.approx(operations, rel=0.01)


@pytest.mark.parametrize("patch", (2, 4, 8))
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_every_size_and_patch_gives_four_latents(size, patch):
    outputs = on_meta(size, patch)(*one_latent_and_label())
    assert outputs.shape == (4, 1, 4, 32, 32)


@pytest.mark.parametrize(
    ("resolution", "patch", "stages"), [(16, 1, 4), (16, 4, 2), (32, 2, 1), (32, 8, 8), (64, 8, 4)]
)
def test_any_square_resolution_patch_and_number_of_stages(resolution, patch, stages):
    generator = build(replace(TINY, resolution=resolution, patch=patch, stages=stages))
    outputs = generator(*inputs(2))
    assert outputs.shape == (stages, 2, 3, resolution, resolution)
    assert outputs.dtype == torch.float32
    assert outputs.isfinite().all()


def test_each_output_adds_its_own_heads_residual_to_the_one_before():
    generator = build()
    residuals: list[torch.Tensor] = []
    for head in generator.heads:
        head.register_forward_hook(lambda _head, _inputs, output: residuals.append(output))
    outputs = generator(*inputs())
    assert len(residuals) == 4
    torch.testing.assert_close(outputs, torch.stack(residuals).cumsum(dim=0))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_silent_head_leaves_the_output_of_the_stage_before(stage):
    generator = build()
    before = generator(*inputs())
    torch.nn.init.zeros_(generator.heads[stage].output.weight)
    outputs = generator(*inputs())
    assert torch.equal(outputs[stage], outputs[stage - 1])
    assert torch.equal(outputs[:stage], before[:stage])
    assert not torch.equal(outputs[stage], before[stage])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_k_of_four_is_the_work_of_the_first_k_quarters_of_the_blocks(stage):
    generator = build()
    generator(*inputs())[stage].square().sum().backward()
    reached = [bool(block.modulation.weight.grad.any()) for block in generator.blocks]
    assert reached == [index < 2 * (stage + 1) for index in range(8)]


def test_the_same_input_gives_the_same_output():
    generator = build()
    first = generator(*inputs())
    torch.manual_seed(123)
    assert torch.equal(generator(*inputs()), first)
    assert torch.equal(build()(*inputs()), first)


@pytest.mark.parametrize("image", [0, 1, 2])
def test_an_image_depends_on_its_own_latent_and_label_alone(image):
    generator = build()
    z, labels = inputs()
    before = generator(z, labels)
    others = torch.arange(3) != image
    z[image] += 1.0
    by_latent = generator(z, labels)
    assert torch.equal(by_latent[:, others], before[:, others])
    assert (by_latent[:, image] != before[:, image]).flatten(1).any(dim=1).all()
    labels[image] = (labels[image] + 1) % 3
    by_label = generator(z, labels)
    assert torch.equal(by_label[:, others], before[:, others])
    assert (by_label[:, image] != by_latent[:, image]).flatten(1).any(dim=1).all()


def test_an_image_is_the_same_alone_and_in_a_batch():
    generator = build()
    z, labels = inputs()
    alone = [generator(z[i : i + 1], labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(generator(z, labels), torch.cat(alone, dim=1))


def test_only_the_direction_of_the_latent_counts():
    generator = build()
    z, labels = inputs()
    torch.testing.assert_close(generator(7.0 * z, labels), generator(z, labels))


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_no_parameter_is_dead(activation_checkpointing):
    generator = build(replace(TINY, activation_checkpointing=activation_checkpointing))
    generator(*inputs()).sin().sum().backward()
    missing = [name for name, p in generator.named_parameters() if p.grad is None]
    assert missing == []
    # Entry by entry: a shift that is computed and not added would hide in a larger layer.
    dead = {name: int((p.grad == 0).sum()) for name, p in generator.named_parameters()}
    assert {name: count for name, count in dead.items() if count} == {}


def test_checkpointing_activations_changes_neither_outputs_nor_gradients():
    results = []
    for checkpointing in (False, True):
        generator = build(replace(TINY, activation_checkpointing=checkpointing))
        outputs = generator(*inputs())
        outputs.sin().sum().backward()
        results.append([outputs, *(p.grad for p in generator.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_under_autocast_blocks_run_in_bf16_while_style_and_outputs_stay_fp32():
    generator = build(replace(TINY, autocast_dtype=torch.bfloat16))
    seen: dict[str, torch.dtype] = {}
    for name, part in generator.named_modules():
        part.register_forward_hook(
            lambda _part, _inputs, output, name=name: seen.update({name: output.dtype})
        )
    # An autocast that the caller has open must not reach the mapping network either.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = generator(*inputs())
    assert seen["blocks.0.attention.qkv"] == torch.bfloat16
    assert seen["blocks.7.feed_forward.contract"] == torch.bfloat16
    assert seen["mapping.first"] == seen["mapping.second"] == torch.float32
    assert outputs.dtype == torch.float32
    exact = build()(*inputs())
    assert (outputs - exact).norm() < 0.05 * exact.norm()
