"""`headrace_kernels.moe_sort.sort_blocks` in Triton: one launch, one program an expert, no program waits for another.

Every program reads all assignments twice: once to count, so that it knows where its expert's rows begin, and once to
place those of its expert. That is E times the reading, out of the L2 cache, for the sake of one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.expert_blocks import DeviceBlocks, empty_blocks
from headrace_kernels.gpu.launch import launch

_CHUNK = 4096


def sort_blocks(experts: Tensor, num_experts: int, block_size: int, first_local: int, num_local: int) -> DeviceBlocks:
    """See `headrace_kernels.moe_sort.sort_blocks`."""
    experts = experts.contiguous()
    total = experts.numel()
    blocks = empty_blocks(total, num_experts, num_local, block_size, experts)
    chunk = min(_CHUNK, max(triton.next_power_of_2(total), 16))
    launch(
        _sort_kernel,
        (num_local + 1,),
        experts,
        blocks.assignment,
        blocks.block_expert,
        blocks.num_blocks,
        blocks.counts,
        total,
        num_experts,
        first_local,
        num_local,
        len(blocks.block_expert),
        BLOCK_SIZE=block_size,
        CHUNK=chunk,
        BINS=bins(num_experts),
        num_warps=8 if chunk > 1024 else 4,
    )
    return blocks


def bins(num_experts: int) -> int:
    """Return how many counters a program keeps: one an expert, and at least one for assignments of none."""
    return 1 << max(num_experts.bit_length(), 4)


@triton.jit(do_not_specialize=["total", "max_blocks"])
def _sort_kernel(
    experts_ptr,
    assignment_ptr,
    block_expert_ptr,
    num_blocks_ptr,
    counts_ptr,
    total,
    num_experts,
    first_local,
    num_local,
    max_blocks,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    local = tl.program_id(0)
    i = tl.arange(0, CHUNK)
    bin_ids = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, total, CHUNK):
        is_inside = start + i < total
        expert = tl.load(experts_ptr + start + i, mask=is_inside, other=-1).to(tl.int32)
        is_expert = (expert >= 0) & (expert < num_experts)
        counts += tl.histogram(tl.where(is_expert, expert, num_experts), BINS)
    is_local = (bin_ids >= first_local) & (bin_ids < first_local + num_local)
    blocks = tl.where(is_local, (counts + BLOCK_SIZE - 1) // BLOCK_SIZE, 0)
    # The last program belongs to no expert: it writes the totals, and the padding past the last block.
    first_block = tl.sum(tl.where(bin_ids < first_local + local, blocks, 0))
    if local == num_local:
        tl.store(num_blocks_ptr, first_block)
        tl.store(counts_ptr + bin_ids, counts, mask=bin_ids < num_experts)
        end = max_blocks
        num_own = 0
    else:
        num_own = tl.sum(tl.where(bin_ids == first_local + local, counts, 0))
        end = first_block + (num_own + BLOCK_SIZE - 1) // BLOCK_SIZE
    for start in range(first_block, end, CHUNK):
        owner = tl.where(local == num_local, -1, local)
        tl.store(block_expert_ptr + start + i, tl.full([CHUNK], 0, tl.int32) + owner, mask=start + i < end)
    for start in range(first_block * BLOCK_SIZE + num_own, end * BLOCK_SIZE, CHUNK):
        row = start + i
        tl.store(assignment_ptr + row, tl.full([CHUNK], 0, tl.int32) + total, mask=row < end * BLOCK_SIZE)
    if num_own > 0:
        row = first_block * BLOCK_SIZE
        for start in range(0, total, CHUNK):
            expert = tl.load(experts_ptr + start + i, mask=start + i < total, other=-1).to(tl.int32)
            is_own = expert == first_local + local
            rank = tl.cumsum(is_own.to(tl.int32), axis=0) - 1
            tl.store(assignment_ptr + row + rank, start + i, mask=is_own)
            row += tl.sum(is_own.to(tl.int32))


@triton.jit
def sort_few(
    experts_ptr,
    assignment_ptr,
    block_expert_ptr,
    num_blocks_ptr,
    counts_ptr,
    total,
    num_experts,
    first_local,
    num_local,
    BLOCK_SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    BINS: tl.constexpr,
) -> None:
    """Do in one program what `_sort_kernel` does, for up to COUNT assignments, a power of two.

    Writes no padding: the caller has filled `assignment` with `total` and `block_expert` with -1.
    """
    i = tl.arange(0, COUNT)
    bin_ids = tl.arange(0, BINS)
    # Other programs wrote the experts during this launch: past the L1 cache, which does not know.
    expert = tl.load(experts_ptr + i, mask=i < total, other=-1, cache_modifier=".cg").to(tl.int32)
    is_expert = (expert >= 0) & (expert < num_experts)
    counts = tl.histogram(tl.where(is_expert, expert, num_experts), BINS)
    tl.store(counts_ptr + bin_ids, counts, mask=bin_ids < num_experts)
    is_local_bin = (bin_ids >= first_local) & (bin_ids < first_local + num_local)
    local_counts = tl.where(is_local_bin, counts, 0)
    blocks = (local_counts + BLOCK_SIZE - 1) // BLOCK_SIZE
    tl.store(num_blocks_ptr, tl.sum(blocks))
    # How far padding moves each expert's rows from their places in the sorted order.
    shifts = (tl.cumsum(blocks) - blocks) * BLOCK_SIZE - (tl.cumsum(local_counts) - local_counts)
    is_local = (expert >= first_local) & (expert < first_local + num_local)
    keys = tl.sort(tl.where(is_local, expert, BINS) * COUNT + i)
    expert = keys // COUNT
    is_local = expert < BINS
    row = i + tl.gather(shifts, tl.minimum(expert, BINS - 1), axis=0)
    tl.store(assignment_ptr + row, keys % COUNT, mask=is_local)
    tl.store(block_expert_ptr + row // BLOCK_SIZE, expert - first_local, mask=is_local & (row % BLOCK_SIZE == 0))
