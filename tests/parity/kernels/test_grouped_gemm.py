"""Products with stacked experts, and the combine, against their specifications."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from headrace_kernels.act_quant import act_quant_ref
from headrace_kernels.fp8_groups import FP8
from headrace_kernels.gpu import configs
from headrace_kernels.gpu.grouped_gemm import default_tile
from headrace_kernels.grouped_gemm import (
    combine_assignments,
    combine_assignments_ref,
    experts_down,
    experts_down_ref,
    experts_gate_up,
    experts_gate_up_ref,
)

from tests.parity.kernels.moe_cases import (
    DTYPES,
    activations,
    blocks_of,
    gate_up_weight,
    live_rows,
    nan_empty,
    routing,
    weight,
)

NAN = float("nan")


def poisoned(values: torch.Tensor, is_used: torch.Tensor) -> torch.Tensor:
    """`values` with NaN wherever it must not be read; 0x7f is fp8's NaN."""
    if values.dtype == FP8:
        return values.view(torch.uint8).masked_fill(~is_used, 0x7F).view(FP8)
    return values.masked_fill(~is_used, NAN)


def used_experts(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.isin(torch.arange(num_experts, device=experts.device), experts)[:, None, None]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "hidden", "width", "block_size"),
    [(5, 2, 72, 40, 16), (20, 2, 130, 136, 32), (1, 1, 128, 130, 64), (3, 2, 33, 17, 128)],
)
def test_products_equal_their_specifications(num_tokens, top_k, hidden, width, block_size, dtype, tolerance, device):
    experts, _ = routing(num_tokens, top_k, 4, device)
    blocks = blocks_of(experts, 6, block_size)
    is_live = live_rows(blocks)
    x = activations(num_tokens, hidden, dtype, device)
    gate_up, scale = gate_up_weight(6, width, hidden, dtype, device)
    rows = experts_gate_up(x, poisoned(gate_up, used_experts(experts, 6)), blocks, scale)
    expected = experts_gate_up_ref(x, gate_up, blocks, scale)
    torch.testing.assert_close(rows[is_live], expected[is_live], rtol=tolerance, atol=tolerance)

    down, scale = weight((6, hidden, width), dtype, device)
    rows = poisoned(expected, is_live[:, None])
    out = experts_down(rows, poisoned(down, used_experts(experts, 6)), blocks, scale)
    expected = experts_down_ref(expected, down, blocks, scale)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_the_width_of_deepseek_v2_lite_at_its_real_tiles(device):
    experts = torch.tensor([[1]], device=device)
    blocks = blocks_of(experts, 2)
    x = activations(1, 256, torch.bfloat16, device)
    gate_up, _ = gate_up_weight(2, 1408, 256, torch.bfloat16, device)
    down, _ = weight((2, 256, 1408), torch.bfloat16, device)
    rows = experts_gate_up(x, gate_up, blocks)
    expected = experts_gate_up_ref(x, gate_up, blocks)
    torch.testing.assert_close(rows[:1], expected[:1], rtol=2e-2, atol=2e-2)
    expected_out = experts_down_ref(expected, down, blocks)
    torch.testing.assert_close(experts_down(expected, down, blocks), expected_out, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("block_size", [16, 64])
def test_activations_quantised_before_give_the_same_bits_as_quantised_in_the_kernel(block_size, device):
    experts, _ = routing(4, 2, 3, device)
    blocks = blocks_of(experts, 3, block_size)
    is_live = live_rows(blocks)
    x = activations(4, 200, FP8, device)
    gate_up, scale = gate_up_weight(3, 40, 200, FP8, device)
    here = experts_gate_up(x, gate_up, blocks, scale)
    before = experts_gate_up(*_split(act_quant_ref(x), gate_up, blocks, scale))
    assert torch.equal(here[is_live], before[is_live])


def _split(quantised, gate_up, blocks, scale):
    values, scales = quantised
    return values, gate_up, blocks, scale, scales


def test_a_row_does_not_depend_on_its_neighbours_nor_on_its_place(device):
    experts, _ = routing(24, 2, 2, device)
    x = activations(24, 96, torch.float32, device)
    gate_up, _ = gate_up_weight(2, 48, 96, torch.float32, device)
    down, _ = weight((2, 96, 48), torch.float32, device)

    def product(tokens: slice):
        blocks = blocks_of(experts[tokens], 2)
        return experts_down(experts_gate_up(x[tokens], gate_up, blocks), down, blocks)

    whole = product(slice(None))
    for token in (0, 13, 23):
        assert torch.equal(product(slice(token, token + 1)), whole[2 * token : 2 * token + 2])


@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize("group", [1, 3])
def test_swapped_operands_and_other_launch_orders_give_the_same(swap, group, device):
    experts, _ = routing(40, 1, 2, device)
    blocks = blocks_of(experts, 2)
    x = activations(40, 64, torch.float32, device)
    gate_up, _ = gate_up_weight(2, 80, 64, torch.float32, device)
    tile = {**default_tile(torch.float32, 16, is_gated=True), "SWAP_AB": swap, "GROUP_M": group}
    with configs.use_config("grouped_gemm", tile):
        rows = experts_gate_up(x, gate_up, blocks)
    expected = experts_gate_up_ref(x, gate_up, blocks)
    is_live = live_rows(blocks)
    torch.testing.assert_close(rows[is_live], expected[is_live], rtol=1e-4, atol=1e-4)


def test_a_block_without_an_expert_is_not_computed(device, monkeypatch):
    """The assignments of such a block stay as they were: here the one of token 1, for which nothing is written."""
    blocks = blocks_of(torch.tensor([[0], [1]], device=device), 2)
    blocks = dataclasses.replace(blocks, block_expert=torch.tensor([0, -1], dtype=torch.int32, device=device))
    down, _ = weight((2, 32, 32), torch.float32, device)
    rows = torch.full((32, 32), NAN, device=device)
    rows[0] = 1.0
    nan_empty(monkeypatch)
    out = experts_down(rows, down, blocks)
    torch.testing.assert_close(out[0], down[0].sum(dim=1), rtol=1e-4, atol=1e-4)
    assert out[1].isnan().all()


def test_no_tokens(device):
    blocks = blocks_of(torch.zeros((0, 2), dtype=torch.int64, device=device), 3)
    gate_up, _ = gate_up_weight(3, 16, 32, torch.float32, device)
    rows = experts_gate_up(torch.zeros((0, 32), device=device), gate_up, blocks)
    assert rows.shape == (0, 16)
    assert experts_down(rows, torch.zeros((3, 32, 16), device=device), blocks).shape == (0, 32)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES[:2])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("num_tokens", "top_k", "hidden"), [(3, 2, 1100), (1, 8, 64), (0, 2, 64)])
def test_combine_equals_its_specification(num_tokens, top_k, hidden, has_residual, dtype, tolerance, device):
    experts, weights = routing(num_tokens, top_k, 9, device)
    rows = activations(num_tokens * top_k, hidden, dtype, device)
    residual = activations(num_tokens, hidden, dtype, device) if has_residual else None
    local = range(2, 6)
    is_local = ((experts >= 2) & (experts < 6)).view(-1, 1)
    out = combine_assignments(poisoned(rows, is_local), experts, weights, local, residual)
    expected = combine_assignments_ref(rows, experts, weights, local, residual)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_what_does_not_fit_is_refused(device):
    blocks = blocks_of(torch.tensor([[0], [1]], device=device), 2)
    x = torch.zeros(2, 32, device=device)
    gate_up, down = torch.zeros(2, 16, 32, device=device), torch.zeros(2, 32, 8, device=device)
    rows = torch.zeros(32, 8, device=device)
    experts, weights = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="does not fit weight"):
        experts_gate_up(x[:, :16], gate_up, blocks)
    with pytest.raises(ValueError, match="gate and up"):
        experts_gate_up(x, gate_up[:, :15].contiguous(), blocks)
    with pytest.raises(ValueError, match="scales for float8"):
        experts_gate_up(x, gate_up, blocks, torch.zeros(2, 2, 1, device=device))
    with pytest.raises(ValueError, match="does not fit its scales"):
        experts_gate_up(x, gate_up, blocks, None, torch.zeros(2, 1, device=device))
    with pytest.raises(ValueError, match="blocks of 8 rows"):
        experts_gate_up(x, gate_up, dataclasses.replace(blocks, block_size=8))
    with pytest.raises(ValueError, match="multiple"):
        experts_gate_up(torch.zeros(3, 32, device=device), gate_up, blocks)
    with pytest.raises(ValueError, match="rows in blocks"):
        experts_down(rows[:16], down, blocks)
    with pytest.raises(ValueError, match="one an assignment"):
        combine_assignments(rows, experts, weights, range(2))
    with pytest.raises(ValueError, match="residual"):
        combine_assignments(rows[:2], experts, weights, range(2), x)
    with pytest.raises(ValueError, match="int"):
        combine_assignments(rows[:2], experts.float(), weights, range(2))
