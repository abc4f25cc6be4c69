"""The discriminator: one logit for each scale, from that scale alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cat_ray.model.discriminator import Discriminator, DiscriminatorShape
from cat_ray.model.sizes import SIZES, Size, scales

TINY = DiscriminatorShape(
    size=Size(depth=2, width=16, heads=2),
    patch=2,
    scales=(4, 8, 16),
    channels=3,
    num_classes=3,
    projection_width=8,
)
ALIGNED = replace(TINY, teacher_width=6)
ROWS = 3


def build(shape: DiscriminatorShape = TINY) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(shape)


def inputs(shape: DiscriminatorShape = TINY) -> tuple[list[Tensor], Tensor]:
    numbers = torch.Generator().manual_seed(1)
    pyramid = [
        torch.randn(ROWS, shape.channels, side, side, generator=numbers) for side in shape.scales
    ]
    return pyramid, torch.arange(ROWS)


@pytest.mark.parametrize(
    ("resolution", "stages", "expected"),
    [(32, 4, (4, 8, 16, 32)), (64, 4, (8, 16, 32, 64)), (12, 3, (3, 6, 12)), (16, 1, (16,))],
)
def test_scales_halve_from_the_full_resolution_down_and_are_listed_coarse_to_fine(
    resolution, stages, expected
):
    assert scales(resolution, stages) == expected


@pytest.mark.parametrize(("resolution", "stages"), [(12, 4), (4, 4), (31, 2)])
def test_a_resolution_that_cannot_be_halved_so_often_is_refused(resolution, stages):
    with pytest.raises(ValueError, match=f"{resolution} can't be halved {stages - 1} times"):
        scales(resolution, stages)


def test_the_base_discriminator_of_the_paper_has_97_million_parameters():
    with torch.device("meta"):
        shape = DiscriminatorShape(SIZES["B"], 2, scales(32, 4), channels=4, num_classes=1000)
        plain, aligned = (Discriminator(s) for s in (shape, replace(shape, teacher_width=768)))
        pyramid = [torch.empty(2, 4, side, side) for side in shape.scales]
        logits, _ = plain(pyramid, torch.empty(2, dtype=torch.long))
    assert sum(p.numel() for p in plain.parameters()) == pytest.approx(97.1e6, abs=0.1e6)
    assert sum(p.numel() for p in aligned.parameters()) == pytest.approx(104.4e6, abs=0.1e6)
    assert logits.shape == (2, 4)
    assert plain.lengths == [5, 17, 65, 257]


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_scales_image_changes_that_scales_logit_and_no_other(changed, activation_checkpointing):
    discriminator = build(replace(TINY, activation_checkpointing=activation_checkpointing))
    pyramid, labels = inputs()
    before, _ = discriminator(pyramid, labels)
    pyramid[changed] = pyramid[changed] + 1.0
    after, _ = discriminator(pyramid, labels)
    others = [scale for scale in range(3) if scale != changed]
    assert torch.equal(after[:, others], before[:, others])
    assert (after[:, changed] != before[:, changed]).all()


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_aggregated_every_logit_sees_every_scale(changed):
    discriminator = build(replace(TINY, scope="aggregated"))
    pyramid, labels = inputs()
    before, _ = discriminator(pyramid, labels)
    pyramid[changed] = pyramid[changed] + 1.0
    after, _ = discriminator(pyramid, labels)
    assert (after != before).all()


@pytest.mark.parametrize("scope", ["scale_wise", "aggregated"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_rows_of_the_batch_do_not_see_each_other(row, scope):
    discriminator = build(replace(ALIGNED, scope=scope))
    pyramid, labels = inputs()
    before = discriminator(pyramid, labels, aligned_rows=ROWS)
    for images in pyramid:
        images[row] += 1.0
    labels[row] = (labels[row] + 1) % 3
    after = discriminator(pyramid, labels, aligned_rows=ROWS)
    others = torch.arange(ROWS) != row
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[others], old[others])
        assert (new[row] != old[row]).any()


def test_the_logit_depends_on_the_class():
    discriminator = build()
    pyramid, labels = inputs()
    before, _ = discriminator(pyramid, labels)
    after, _ = discriminator(pyramid, (labels + 1) % 3)
    assert (after != before).all()


def test_a_logit_is_the_product_of_the_images_feature_and_the_class_vector():
    discriminator = build()
    pyramid, labels = inputs()
    features: list[Tensor] = []
    discriminator.feature.register_forward_hook(lambda _m, _i, output: features.append(output))
    logits, _ = discriminator(pyramid, labels)
    vectors = discriminator.class_vector(labels)
    torch.testing.assert_close(logits, (features[0] * vectors[:, None]).sum(dim=2))


def test_each_scale_reads_its_own_cls_token_and_scale_embedding():
    discriminator = build()
    logits, _ = discriminator(*inputs())
    for scale in range(3):
        cls, embedding = torch.autograd.grad(
            logits[:, scale].sum(),
            [discriminator.cls, discriminator.scale_embedding],
            retain_graph=True,
        )
        own = torch.arange(3) == scale
        for gradient in (cls, embedding):
            assert (gradient[own] != 0).any()
            assert not gradient[~own].any()


def test_cls_tokens_have_no_position():
    discriminator = build()
    assert discriminator.lengths == [5, 17, 65]
    at = [0, 5, 22]
    assert not discriminator.positions[at].any()
    assert (discriminator.cosines[at] == 1).all()
    assert not discriminator.sines[at].any()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_logits_and_projections_are_fp32(dtype):
    discriminator = build(replace(ALIGNED, autocast_dtype=dtype))
    logits, projected = discriminator(*inputs(), aligned_rows=1)
    assert logits.dtype == projected.dtype == torch.float32
    # Not merely cast at the end: rounded logits would all survive the way through bf16.
    assert (logits.bfloat16().float() != logits).any()


@pytest.mark.parametrize("open_outside", [False, True])
def test_autocast_reaches_the_blocks_but_neither_the_first_layer_nor_the_head(open_outside):
    discriminator = build(replace(TINY, autocast_dtype=torch.bfloat16))
    seen: dict[str, torch.dtype] = {}
    for name, part in discriminator.named_modules():
        if name:
            part.register_forward_hook(
                lambda _part, _inputs, output, name=name: seen.update({name: output.dtype})
            )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=open_outside):
        logits, _ = discriminator(*inputs())
    assert seen["blocks.0.attention.qkv"] == torch.bfloat16
    assert seen["blocks.1.feed_forward.contract"] == torch.bfloat16
    assert seen["patch_embedding"] == torch.float32
    assert seen["feature"] == seen["class_vector"] == seen["class_vector.first"] == torch.float32
    assert logits.dtype == torch.float32
    exact, _ = build()(*inputs())
    assert (logits - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("teacher_width", [None, 6])
def test_the_projector_exists_only_for_a_teacher(teacher_width):
    discriminator = build(replace(TINY, teacher_width=teacher_width))
    names = [name for name, _ in discriminator.named_parameters() if "projector" in name]
    assert bool(names) == (teacher_width is not None)
    assert (discriminator.projector is None) == (teacher_width is None)


def test_alignment_without_a_projector_is_refused():
    with pytest.raises(AssertionError, match="no alignment projector"):
        build()(*inputs(), aligned_rows=1)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_first_rows_finest_tokens_are_projected_to_the_teachers_width(rows):
    discriminator = build(ALIGNED)
    pyramid, labels = inputs()
    _, everything = discriminator(pyramid, labels, aligned_rows=ROWS)
    logits, projected = discriminator(pyramid, labels, aligned_rows=rows)
    assert logits.shape == (ROWS, 3)
    assert projected.shape == (rows, 1 + 64, 6)
    torch.testing.assert_close(projected, everything[:rows])


def test_without_aligned_rows_nothing_is_projected_and_the_logits_are_the_same():
    discriminator = build(ALIGNED)
    logits, projected = discriminator(*inputs())
    assert projected is None
    assert torch.equal(logits, discriminator(*inputs(), aligned_rows=2)[0])


def test_alignment_sees_the_finest_scale_alone():
    discriminator = build(ALIGNED)
    pyramid, labels = inputs()
    for images in pyramid:
        images.requires_grad_()
    _, projected = discriminator(pyramid, labels, aligned_rows=2)
    gradients = torch.autograd.grad(projected.square().sum(), pyramid)
    assert [bool(gradient.any()) for gradient in gradients] == [False, False, True]
    assert gradients[2].flatten(1).any(dim=1).tolist() == [True, True, False]


def test_projected_tokens_are_cls_and_then_the_patches_in_raster_order():
    # Without blocks a token knows nothing but its own patch.
    discriminator = build(replace(ALIGNED, size=Size(depth=0, width=16, heads=2)))
    pyramid, labels = inputs()
    finest = pyramid[-1].requires_grad_()
    _, projected = discriminator(pyramid, labels, aligned_rows=1)
    for token, place in [(0, None), (1, (0, 0)), (2, (0, 2)), (9, (2, 0)), (64, (14, 14))]:
        (gradient,) = torch.autograd.grad(
            projected[0, token].square().sum(), finest, retain_graph=True
        )
        touched = gradient[0].ne(0).any(dim=0).nonzero()
        if place is None:
            assert len(touched) == 0
        else:
            assert touched.amin(dim=0).tolist() == list(place)
            assert touched.amax(dim=0).tolist() == [place[0] + 1, place[1] + 1]


@pytest.mark.parametrize("scope", ["scale_wise", "aggregated"])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_no_parameter_is_dead(scope, activation_checkpointing):
    discriminator = build(
        replace(ALIGNED, scope=scope, activation_checkpointing=activation_checkpointing)
    )
    logits, projected = discriminator(*inputs(), aligned_rows=2)
    (logits.sin().sum() + projected.sin().sum()).backward()
    missing = [name for name, p in discriminator.named_parameters() if p.grad is None]
    assert missing == []
    dead = {name: int((p.grad == 0).sum()) for name, p in discriminator.named_parameters()}
    assert {name: count for name, count in dead.items() if count} == {}
