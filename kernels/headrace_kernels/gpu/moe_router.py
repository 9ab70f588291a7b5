"""`headrace_kernels.moe_router` in Triton, one launch: many programs compute logits, the last to arrive does the rest.

A program takes some experts, a slice of the hidden dimension and a tile of tokens. It normalises its tokens, writes the
partial logits, and arrives at its tile's counter. The last to arrive there adds the partial logits in a fixed order and
routes the tile's tokens; then it arrives at the launch's counter, where the last tile sorts the assignments. No program
waits. The last to arrive resets the counter for the next launch.

Why the last program sees what the others wrote. A program's threads store; the barrier (bar.sync) orders all of them
before its one atomic, which releases at the scope of the GPU. The last program's atomic on the same counter acquires:
it reads a value from the chain of increments that every other program's release heads, so it synchronises with each of
them (increments are read-modify-writes, which continue a release sequence). Its other threads follow the atomic through
the barrier with which its result is handed to them. Happens-before is transitive across these scopes in PTX's memory
model, so the loads after it see the stores before. They bypass the L1 cache besides.

What is compiled for an MI300X lacks the first step: no wait for a wave's stores stands before the barrier (s_barrier
without s_waitcnt vmcnt(0)), so the release of another wave need not cover them. There the four steps are taken.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.expert_blocks import empty_blocks
from headrace_kernels.gpu import configs
from headrace_kernels.gpu.launch import launch, num_sms, target
from headrace_kernels.gpu.moe_routing import column_experts, empty_routing, route, routing_constants
from headrace_kernels.gpu.moe_sort import bins, sort_few
from headrace_kernels.gpu.rms_norm import normalise
from headrace_kernels.moe_router import route_and_sort_ref
from headrace_kernels.routing_rule import RoutedTokens, Router

_BLOCK_N = 32
_MOST_SLICES = 16
_MOST_TILES = 64
# A row's squares must be summed in one order whatever BLOCK_T is. So wide, and with at least two rows, every row has
# the same threads: those of its 16-byte loads, by four warps in bfloat16 and by eight in float32.
_WIDE = 1024
# One launch beyond this would leave too much to its last program. 0: always four steps.
FUSED_ROWS = 64
DEFAULT_CONFIG: configs.Config = {"num_warps": 8, "num_stages": 4}


def route_and_sort(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    router: Router,
    block_size: int | None,
    slot_mapping: Tensor | None,
    first_local: int,
    num_local: int,
) -> RoutedTokens:
    """See `headrace_kernels.moe_router.route_and_sort`; for many tokens, and on AMD's GPUs, its four steps."""
    if block_size is None or len(x) > FUSED_ROWS or target() == "hip":
        return route_and_sort_ref(x, norm_weight, eps, router, block_size, slot_mapping, first_local, num_local)
    num_rows, width = x.shape
    num_routed = len(router.weight)
    experts, weights = empty_routing(num_rows, router.rule, router.num_shared, x)
    num_experts = num_routed + router.num_shared
    blocks = empty_blocks(experts.numel(), num_experts, num_local, block_size, x)
    normalised = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        blocks.counts.zero_()
        blocks.num_blocks.zero_()
        return RoutedTokens(normalised, experts, weights, blocks)
    # Slices depend on the layer alone, so that a token's logits do not depend on the batch.
    programs_for_32 = max(num_sms(x) // triton.cdiv(num_routed, 32), 1)
    num_slices = min(triton.cdiv(width, _BLOCK_N), _MOST_SLICES, programs_for_32)
    block_t = 2 if num_rows <= 2 else 4 if num_rows <= 4 else 16
    num_tiles = triton.cdiv(num_rows, block_t)
    block_e = _experts_of_program(num_routed, num_slices * num_tiles, x)
    grid = (triton.cdiv(num_routed, block_e), num_slices, num_tiles)
    partial = torch.empty(num_slices, num_rows, num_routed, dtype=torch.float32, device=x.device)
    launch(
        _router_kernel,
        grid,
        *(x, x.stride(0), norm_weight, router.weight, router.bias, slot_mapping, normalised, partial),
        *(
            _counters(x.device),
            experts,
            weights,
            blocks.assignment,
            blocks.block_expert,
            blocks.num_blocks,
            blocks.counts,
        ),
        *(num_rows, width, num_routed, eps, router.rule.scaling_factor),
        *(len(blocks.assignment), first_local, num_local),
        **routing_constants(router.rule, num_routed, router.num_shared, router.bias),
        HAS_PADDING=slot_mapping is not None,
        BLOCK_SIZE=block_size,
        COUNT=_sorted_count(experts.numel()),
        BINS=bins(num_experts),
        SLICE=triton.cdiv(width, num_slices * _BLOCK_N) * _BLOCK_N,
        NUM_SLICES=num_slices,
        BLOCK_E=block_e,
        BLOCK_T=block_t,
        BLOCK_N=_BLOCK_N,
        MOST_TILES=_MOST_TILES,
        WIDE=_WIDE,
        **configs.config("moe_router", config_key(num_routed, width), DEFAULT_CONFIG, x),
    )
    return RoutedTokens(normalised, experts, weights, blocks)


def config_key(num_experts: int, width: int) -> str:
    """Return the key of a configuration: never the number of rows, which a row's sums must not depend on."""
    return f"{num_experts}x{width}"


def _experts_of_program(num_experts: int, programs_per_block: int, x: Tensor) -> int:
    """Return how many experts a program takes: as few as need no second wave of programs."""
    sizes = (16, 32, 64)
    return next((e for e in sizes if -(-num_experts // e) * programs_per_block <= num_sms(x)), sizes[-1])


def _sorted_count(num_assignments: int) -> int:
    """Return the least of 64, 256, 1024, ... that is enough: every size is a kernel to compile."""
    return 4 ** max(-(-(num_assignments - 1).bit_length() // 2), 3)


@cache
def _counters(device: torch.device) -> Tensor:
    """Return the counters of arrivals at each tile and, last, of tiles; 0 between launches."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("route_and_sort must be called once before a call of it is captured into a CUDA graph")
    return torch.zeros(_MOST_TILES + 1, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["num_rows", "max_rows"])
def _router_kernel(
    x_ptr,
    x_stride,
    norm_weight_ptr,
    router_ptr,
    bias_ptr,
    slot_ptr,
    normalised_ptr,
    partial_ptr,
    counters_ptr,
    experts_ptr,
    weights_ptr,
    assignment_ptr,
    block_expert_ptr,
    num_blocks_ptr,
    counts_ptr,
    num_rows,
    width,
    num_experts,
    eps,
    scaling_factor,
    max_rows,
    first_local,
    num_local,
    PER_TOKEN: tl.constexpr,
    SHARED: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    IS_TOP2: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    BINS: tl.constexpr,
    SLICE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOST_TILES: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile = tl.program_id(2)
    num_assignments = num_rows * (PER_TOKEN + SHARED)
    _fill(assignment_ptr, block_expert_ptr, num_assignments, max_rows, BLOCK_SIZE)
    _partial_logits(
        x_ptr,
        x_stride,
        norm_weight_ptr,
        router_ptr,
        normalised_ptr,
        partial_ptr,
        num_rows,
        width,
        num_experts,
        eps,
        SLICE,
        BLOCK_E,
        BLOCK_T,
        BLOCK_N,
        WIDE,
    )
    if _is_last(counters_ptr + tile, tl.num_programs(0) * NUM_SLICES):
        _route_tile(
            partial_ptr,
            bias_ptr,
            slot_ptr,
            experts_ptr,
            weights_ptr,
            tile * BLOCK_T,
            tl.minimum(tile * BLOCK_T + BLOCK_T, num_rows),
            num_rows,
            num_experts,
            scaling_factor,
            NUM_SLICES,
            PER_TOKEN,
            SHARED,
            CHOICES,
            GROUPS,
            GROUP_COLUMNS,
            GROUP_SIZE,
            GROUPS_KEPT,
            IS_TOP2,
            IS_SIGMOID,
            IS_NORMALISED,
            HAS_BIAS,
            HAS_PADDING,
        )
        if _is_last(counters_ptr + MOST_TILES, tl.num_programs(2)):
            sort_few(
                experts_ptr,
                assignment_ptr,
                block_expert_ptr,
                num_blocks_ptr,
                counts_ptr,
                num_assignments,
                num_experts + SHARED,
                first_local,
                num_local,
                BLOCK_SIZE,
                COUNT,
                BINS,
            )


@triton.jit
def _is_last(counter_ptr, num_programs):
    """Arrive at a counter; return whether all others have. The last resets it: see the module's docstring."""
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_programs - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def _fill(assignment_ptr, block_expert_ptr, num_assignments, max_rows, BLOCK_SIZE: tl.constexpr):
    """Write this program's share of the padding, everywhere: the last program puts the assignments over it."""
    FILL: tl.constexpr = 128
    num_programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    for start in range(program * FILL, max_rows, num_programs * FILL):
        row = start + tl.arange(0, FILL)
        is_row = row < max_rows
        tl.store(assignment_ptr + row, num_assignments + tl.zeros([FILL], tl.int32), mask=is_row)
        is_first = is_row & (row % BLOCK_SIZE == 0)
        tl.store(block_expert_ptr + row // BLOCK_SIZE, tl.full([FILL], -1, tl.int32), mask=is_first)


@triton.jit
def _partial_logits(
    x_ptr,
    x_stride,
    norm_weight_ptr,
    router_ptr,
    normalised_ptr,
    partial_ptr,
    num_rows,
    width,
    num_experts,
    eps,
    SLICE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the part of the logits that a slice of the hidden dimension gives, and that slice of the tokens' norm."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    slice_id = tl.program_id(1)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_expert, is_token = e < num_experts, t < num_rows
    rows = t.to(tl.int64)
    squares = tl.zeros([BLOCK_T, WIDE], tl.float32)
    wide_n = tl.arange(0, WIDE)
    for start in tl.range(0, width, WIDE, num_stages=3):
        is_inside = is_token[:, None] & (start + wide_n < width)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + (start + wide_n)[None, :], mask=is_inside, other=0.0)
        x = x.to(tl.float32)
        squares += x * x
    mean_squares = tl.sum(squares, axis=1) / width
    logits = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    end = tl.minimum((slice_id + 1) * SLICE, width)
    for start in range(slice_id * SLICE, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_inside = is_token[:, None] & (n < end)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + n[None, :], mask=is_inside, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + n, mask=n < end, other=0.0).to(tl.float32)
        out = normalise(x, mean_squares[:, None], norm_weight[None, :], eps, normalised_ptr.dtype.element_ty)
        tl.store(normalised_ptr + rows[:, None] * width + n[None, :], out, mask=is_inside & (tl.program_id(0) == 0))
        is_weight = is_expert[:, None] & (n < end)[None, :]
        router = tl.load(router_ptr + e.to(tl.int64)[:, None] * width + n[None, :], mask=is_weight, other=0.0)
        logits = tl.dot(router, tl.trans(out.to(tl.float32)), logits, input_precision="ieee")
    place = (slice_id * num_rows + t).to(tl.int64)[None, :] * num_experts + e[:, None]
    tl.store(partial_ptr + place, logits, mask=is_expert[:, None] & is_token[None, :])


@triton.jit
def _route_tile(
    partial_ptr,
    bias_ptr,
    slot_ptr,
    experts_ptr,
    weights_ptr,
    first_row,
    end_row,
    num_rows,
    num_experts,
    scaling_factor,
    NUM_SLICES: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SHARED: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_KEPT: tl.constexpr,
    IS_TOP2: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    # As many rows at once as there are registers for; not as many as there are, which would change how each is summed.
    ROWS: tl.constexpr = max(min(4096 // (GROUPS * GROUP_COLUMNS), 16), 1)
    expert, is_expert = column_experts(GROUPS, GROUP_COLUMNS, GROUP_SIZE, num_experts)
    bias = tl.zeros([GROUPS * GROUP_COLUMNS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
    k = tl.arange(0, CHOICES)[None, :]
    for start in range(first_row, end_row, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        is_row = row < end_row
        logits = tl.zeros([ROWS, GROUPS * GROUP_COLUMNS], tl.float32)
        for slice_id in tl.static_range(NUM_SLICES):
            place = (slice_id * num_rows + row).to(tl.int64) * num_experts + expert[None, :]
            is_inside = is_row & is_expert[None, :]
            logits += tl.load(partial_ptr + place, mask=is_inside, other=0.0, cache_modifier=".cg")
        experts, weights = route(
            tl.where(is_expert[None, :], logits, float("-inf")),
            bias,
            is_expert,
            scaling_factor,
            num_experts,
            ROWS,
            PER_TOKEN,
            SHARED,
            CHOICES,
            GROUPS,
            GROUP_COLUMNS,
            GROUP_SIZE,
            GROUPS_KEPT,
            IS_TOP2,
            IS_SIGMOID,
            IS_NORMALISED,
            HAS_BIAS,
        )
        if HAS_PADDING:
            is_padding = tl.load(slot_ptr + row, mask=is_row, other=-1) < 0
            experts = tl.where(is_padding, -1, experts)
            weights = tl.where(is_padding, 0.0, weights)
        place = row.to(tl.int64) * (PER_TOKEN + SHARED) + k
        is_choice = is_row & (k < PER_TOKEN + SHARED)
        tl.store(experts_ptr + place, experts.to(tl.int64), mask=is_choice)
        tl.store(weights_ptr + place, weights, mask=is_choice)
