"""The layers that both networks are made of."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cat_ray.model.layers import (
    Attention,
    EqualLinear,
    SwiGLU,
    patchify,
    position_table,
    rotary_table,
    rotate,
    token_places,
    unpatchify,
)

few = settings(max_examples=20, deadline=None, derandomize=True)
patchings = given(
    images=st.integers(1, 3),
    channels=st.integers(1, 4),
    patch=st.sampled_from([1, 2, 4, 8]),
    grid=st.integers(1, 5),
)


def xavier_bound(inputs: int, outputs: int) -> float:
    return math.sqrt(6 / (inputs + outputs))


@few
@patchings
def test_unpatchify_undoes_patchify(images, channels, patch, grid):
    original = torch.randn(images, channels, grid * patch, grid * patch)
    assert torch.equal(unpatchify(patchify(original, patch), patch), original)


@few
@patchings
def test_patchify_undoes_unpatchify(images, channels, patch, grid):
    tokens = torch.randn(images, grid * grid, channels * patch * patch)
    assert torch.equal(patchify(unpatchify(tokens, patch), patch), tokens)


def test_a_token_is_its_patch_channel_by_channel_in_raster_order():
    images = torch.randn(2, 3, 8, 8)
    tokens = patchify(images, 4)
    assert tokens.shape == (2, 4, 48)
    for token, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        block = images[:, :, row : row + 4, column : column + 4]
        assert torch.equal(tokens[:, token], block.flatten(1))


@few
@given(grid=st.integers(1, 6), head_width=st.sampled_from([4, 8, 32, 80]))
def test_rotation_keeps_norms(grid, head_width):
    x = torch.randn(2, 3, grid * grid, head_width, dtype=torch.float64)
    turned = rotate(x, *rotary_table(grid, head_width))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def products(query: torch.Tensor, key: torch.Tensor, grid: int) -> torch.Tensor:
    """Products of one query and one key rotated to every pair of positions, `[g, g, g, g]`."""
    tokens, tables = grid * grid, rotary_table(grid, len(query))
    everywhere = (1, 1, tokens, len(query))
    queries = rotate(query.expand(everywhere), *tables)[0, 0]
    keys = rotate(key.expand(everywhere), *tables)[0, 0]
    return (queries @ keys.T).view(grid, grid, grid, grid)


@few
@given(grid=st.integers(2, 5), head_width=st.sampled_from([4, 8, 64]), seed=st.integers(0, 99))
def test_query_key_products_depend_on_the_relative_position_alone(grid, head_width, seed):
    torch.manual_seed(seed)
    query, key = torch.randn(2, head_width, dtype=torch.float64)
    table = products(query, key, grid)
    shifted = table[1:, 1:, 1:, 1:]
    torch.testing.assert_close(table[:-1, :-1, :-1, :-1], shifted, rtol=1e-5, atol=1e-5)
    # One step along either axis must show, or no rotation at all would pass.
    assert (table[0, 0, 1, 0] - table[0, 0, 0, 0]).abs() > 1e-6
    assert (table[0, 0, 0, 1] - table[0, 0, 0, 0]).abs() > 1e-6


@pytest.mark.parametrize(("half", "follows_rows"), [(0, True), (1, False)])
def test_half_a_head_turns_with_the_row_and_half_with_the_column(half, follows_rows):
    query = torch.zeros(2, 4, dtype=torch.float64)
    query[half] = torch.randn(4, dtype=torch.float64)
    table = products(query.flatten(), query.flatten(), grid=4)
    along_rows, along_columns = table[0, 0, :, 0], table[0, 0, 0, :]
    moving, still = (along_rows, along_columns) if follows_rows else (along_columns, along_rows)
    torch.testing.assert_close(still, still[:1].expand(4), rtol=0, atol=1e-9)
    assert moving.diff().abs().min() > 1e-6


def test_rotation_turns_adjacent_pairs_one_radian_a_step_at_the_highest_frequency():
    x = torch.tensor([1.0, 2.0, 3.0, 5.0]).expand(1, 1, 9, 4)
    turned = rotate(x, *rotary_table(3, 4))[0, 0].view(3, 3, 4)
    pairs = [complex(1, 2) * cmath.exp(2j), complex(3, 5) * cmath.exp(1j)]
    expected = [part for pair in pairs for part in (pair.real, pair.imag)]
    torch.testing.assert_close(turned[2, 1], torch.tensor(expected))


def test_positions_encode_the_row_and_then_the_column_and_are_all_distinct():
    table = position_table(5, 16).view(5, 5, 16)
    rows, columns = table.split(8, dim=-1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert torch.equal(columns, columns[:1].expand_as(columns))
    assert torch.equal(rows[:, 0], columns[0])
    assert torch.cdist(table.view(25, 16), table.view(25, 16)).add(torch.eye(25)).min() > 0.1
    expected = [math.sin(3 * 0.1**k) for k in range(4)] + [math.cos(3 * 0.1**k) for k in range(4)]
    torch.testing.assert_close(rows[3, 0], torch.tensor(expected))


@pytest.mark.parametrize("multiplier", [0.01, 1.0])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 96), (64, 256)])
def test_equal_linear_starts_as_a_xavier_map_whatever_its_multiplier(inputs, outputs, multiplier):
    torch.manual_seed(0)
    layer = EqualLinear(inputs, outputs, multiplier)
    effective = layer(torch.eye(inputs)).detach().T
    bound = xavier_bound(inputs, outputs)
    assert effective.abs().max() <= bound * (1 + 1e-5)
    assert effective.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert torch.equal(layer(torch.zeros(1, inputs)), torch.zeros(1, outputs))


def test_equal_linear_applies_its_multiplier_to_weight_and_bias():
    layer = EqualLinear(5, 3, 0.01)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(4, 5)
    expected = F.linear(x, 0.01 * layer.weight, 0.01 * layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_a_step_on_stored_parameters_moves_the_used_ones_by_the_multiplier():
    layer = EqualLinear(5, 3, 0.01)
    x = torch.eye(5)
    before = layer(x).detach()
    with torch.no_grad():
        layer.weight += 1.0
        layer.bias += 1.0
    torch.testing.assert_close(layer(x).detach() - before, torch.full((5, 3), 0.02))


@pytest.mark.parametrize(
    ("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2730), (1152, 3072), (1280, 3413)]
)
def test_swiglu_is_eight_thirds_as_wide_inside_rounded_down(width, hidden):
    with torch.device("meta"):
        layer = SwiGLU(width)
    assert layer.expand.weight.shape == (2 * hidden, width)
    assert layer.contract.weight.shape == (width, hidden)


def test_swiglu_gates_one_half_of_the_expansion_with_the_silu_of_the_other():
    layer = SwiGLU(6).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expanded = layer.expand(x)
    gate, value = expanded[..., :16], expanded[..., 16:]
    expected = layer.contract(gate * torch.sigmoid(gate) * value)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("width", [20, 40, 64])
def test_swiglu_computes_in_widths_of_eight_and_the_zeros_change_nothing(width):
    layer, reference = SwiGLU(width).double(), SwiGLU(width).double()
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, width, dtype=torch.float64)
    hidden = 8 * width // 3
    assert hidden % 8 != 0 and layer.expand(x).shape[-1] % 16 == 0

    expanded = F.linear(x, reference.expand.weight, reference.expand.bias)
    gate, value = expanded.split(hidden, dim=-1)
    expected = F.linear(F.silu(gate) * value, reference.contract.weight, reference.contract.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def attention_input(grid: int, width: int, heads: int) -> tuple:
    torch.manual_seed(1)
    layer = Attention(width, heads).double()
    x = torch.randn(2, grid * grid, width, dtype=torch.float64)
    return layer, x, rotary_table(grid, width // heads)


@pytest.mark.parametrize("lengths", [[16], [5, 11], [1, 3, 12], [4, 4, 4, 4]])
def test_segmented_attention_equals_attention_on_each_segment_by_itself(lengths):
    layer, x, (cosines, sines) = attention_input(grid=4, width=16, heads=2)
    together = layer(x, (cosines, sines), lengths)
    parts = zip(x.split(lengths, 1), cosines.split(lengths), sines.split(lengths), strict=True)
    alone = [layer(part, (cosine, sine)) for part, cosine, sine in parts]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_a_token_sees_its_own_segment_and_no_other():
    layer, x, rotary = attention_input(grid=4, width=16, heads=2)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x, rotary, [6, 10])[:, 2].sum(), x)
    assert gradient[:, :6].abs().amin(dim=(0, 2)).min() > 0
    assert not gradient[:, 6:].any()


def test_attention_is_the_textbook_formula_on_normalised_queries_and_keys():
    layer, x, rotary = attention_input(grid=3, width=16, heads=2)
    torch.nn.init.normal_(layer.query_gain)
    torch.nn.init.normal_(layer.key_gain)
    per_head = []
    for head in range(2):
        query, key, value = (
            F.linear(x, *(rows[part * 16 + head * 8 :][:8] for rows in layer.qkv.parameters()))
            for part in range(3)
        )
        query = query / query.square().mean(-1, keepdim=True).sqrt() * layer.query_gain
        key = key / key.square().mean(-1, keepdim=True).sqrt() * layer.key_gain
        scores = rotate(query, *rotary) @ rotate(key, *rotary).mT / math.sqrt(8)
        per_head.append(scores.softmax(dim=-1) @ value)
    expected = layer.output(torch.cat(per_head, dim=-1))
    torch.testing.assert_close(layer(x, rotary), expected, rtol=1e-4, atol=1e-5)


def test_the_size_of_queries_and_keys_does_not_sharpen_attention():
    layer, x, rotary = attention_input(grid=3, width=16, heads=2)
    before = layer(x, rotary)
    with torch.no_grad():
        layer.qkv.weight[:32] *= 10
        layer.qkv.bias[:32] *= 10
    torch.testing.assert_close(layer(x, rotary), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [1, 3, 16])
def test_without_a_spacing_tokens_stand_at_the_integers(grid: int) -> None:
    assert token_places(grid).tolist() == list(range(grid))


def test_tokens_of_a_finer_grid_stand_in_the_middle_of_their_part_of_a_coarser_ones() -> None:
    coarse, fine = token_places(4), token_places(8, spacing=4 / 8)
    assert fine.view(4, 2).mean(dim=1).tolist() == coarse.tolist()
    assert (fine.view(4, 2) - coarse[:, None]).tolist() == [[-0.25, 0.25]] * 4


def test_both_tables_take_the_same_places() -> None:
    # At a spacing of 3 the tokens of a grid of 2 stand at 1 and 4: those of a grid of 5 do as well.
    wide, whole = position_table(2, 16, spacing=3.0), position_table(5, 16).view(5, 5, 16)
    assert torch.equal(wide.view(2, 2, 16), whole[[1, 4]][:, [1, 4]])
    turned, unturned = rotary_table(2, 8, spacing=3.0), rotary_table(5, 8)
    for wide, whole in zip(turned, unturned, strict=True):
        assert torch.equal(wide.view(2, 2, 4), whole.view(5, 5, 4)[[1, 4]][:, [1, 4]])
