"""`headrace_kernels.causal_attention` in Triton: one program a tile of queries and a head, keys streamed past it.

A score is the sum of two dots, over a head's columns and over their tail: a width of 192 is computed as 128 + 64, not
padded to 256, and the tail may belong to a tensor of its own that all heads share. One loop takes all keys, and scores
are masked only from the diagonal on: with a loop of its own for the diagonal, ptxas would no longer let the products
overlap, for the accumulators would meet where a loop may have had no turn. Which rows share a tile depends on their own
sequence alone, and so does each result, to the last bit.

Source: Dao, "FlashAttention-2" (arXiv 2307.08691), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.gpu.configs import Config, config
from headrace_kernels.gpu.launch import launch, operand_dtype, target

# Heads run side by side as long as their keys and values fit in an L2 cache: half of an H200's.
_L2_BYTES = 24 << 20
_LEAST_TILE = 16


@dataclass(frozen=True, slots=True)
class KeysValues:
    """Keys and values of all sequences, whatever memory they lie in.

    Attributes:
        key: [S, G, W]; last dimension contiguous, as in all of them.
        tail: [S, G, R], the key's remaining columns; a stride of 0 over G shares them; None: there are none.
        value: [S, G, Dv].
        slots: [S] int64, where each token's row lies in the tensors before, if not in order: a page's values lie
            `page_size` rows after its keys, and `key` and `value` are the rows from the first key and value on.
        page_size: tokens a page holds; with `slots` only.
    """

    key: Tensor
    tail: Tensor | None
    value: Tensor
    slots: Tensor | None = None
    page_size: int = 0


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, *, scale: float
) -> Tensor:
    """See `headrace_kernels.causal_attention.causal_attention`."""
    first = first_width(query.shape[2])
    tail = key[..., first:] if first < key.shape[2] else None
    return attend(query, KeysValues(key[..., :first], tail, value), query_starts, key_starts, scale=scale)


def first_width(width: int) -> int:
    """Return how many of a head's columns the first dot takes; the second takes the rest."""
    power = 1 << (width.bit_length() - 1)
    return power if power >= 4 * _LEAST_TILE else width


def attend(query: Tensor, keys: KeysValues, query_starts: Tensor, key_starts: Tensor, *, scale: float) -> Tensor:
    """Return [T, H, Dv]: `causal_attention` of `query` [T, H, W + R] and keys and values wherever they lie.

    The starts are on the host, and the caller has checked them.
    """
    num_queries, num_heads, width = query.shape
    num_groups, value_dim = keys.value.shape[1:]
    out = torch.empty((num_queries, num_heads, value_dim), dtype=query.dtype, device=query.device)
    query, key, value = _rows(query), _rows(keys.key), _rows(keys.value)
    tail = key if keys.tail is None else _rows(keys.tail)
    tail_dim = 0 if keys.tail is None else tail.shape[2]
    if key.shape[2] + tail_dim != width:
        raise ValueError(f"query {tuple(query.shape)} does not fit keys of {key.shape[2]} + {tail_dim} columns")
    chosen = config("causal_attention", config_key(query, value_dim), default_config(query), query)
    tiles = _tiles(tuple(query_starts.tolist()), tuple(key_starts.tolist()), chosen["BLOCK_M"], query.device)
    launch(
        _attend_kernel,
        (len(tiles) * num_heads,),
        tiles,
        query,
        key,
        tail,
        value,
        tiles if keys.slots is None else keys.slots,
        out,
        *query.stride()[:2],
        *key.stride()[:2],
        *tail.stride()[:2],
        *value.stride()[:2],
        len(tiles),
        num_heads,
        _heads_side_by_side(int(key_starts[-1]) * (width + value_dim) * query.itemsize, num_heads, num_groups),
        scale * math.log2(math.e),
        WIDTH=key.shape[2],
        TAIL=tail_dim,
        VALUE=value_dim,
        TILE_WIDTH=_tile(key.shape[2]),
        TILE_TAIL=_tile(tail_dim),
        TILE_VALUE=_tile(value_dim),
        GROUP=num_heads // num_groups,
        PAGE_SIZE=keys.page_size,
        OPERAND=operand_dtype(query),
        **chosen,
    )
    return out


def config_key(query: Tensor, value_dim: int) -> str:
    """Return what the configuration depends on: neither the batch nor the lengths, so that no result does."""
    return f"{query.dtype} {query.shape[2]} {value_dim}"


def default_config(query: Tensor) -> Config:
    """Return the tiles for `query` [T, H, Dq] where none were measured."""
    if query.dtype == torch.float32 and target() == "cuda":
        # No matrix units: each thread holds what it multiplies, and whole rows are more than its registers.
        return {"BLOCK_M": 32, "BLOCK_N": 16, "CHUNK": 32, "num_warps": 8, "num_stages": 1}
    if query.dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "CHUNK": 0, "num_warps": 4, "num_stages": 1}
    if target() == "hip":
        return {
            "BLOCK_M": 128,
            "BLOCK_N": 32 if query.shape[2] > 128 else 64,
            "CHUNK": 0,
            "num_warps": 4,
            "num_stages": 1,
        }
    return {"BLOCK_M": 128, "BLOCK_N": 64, "CHUNK": 0, "num_warps": 8, "num_stages": 3}


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tile(width: int) -> int:
    return max(int(triton.next_power_of_2(width)), _LEAST_TILE)


def _heads_side_by_side(bytes_per_group: int, num_heads: int, num_groups: int) -> int:
    """Return how many heads' programs to mix: a divisor of H, whole groups, whose keys and values fit in the cache."""
    group = num_heads // num_groups
    fitting = max(_L2_BYTES // max(bytes_per_group, 1), 1)
    return group * max(n for n in range(1, num_groups + 1) if num_groups % n == 0 and (n <= fitting or n == 1))


@lru_cache(maxsize=32)
def _tiles(query_starts: tuple[int, ...], key_starts: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Return [tiles, 4] int32: first query, end of queries, first key, place of the first query in its sequence.

    Most keys first: what is started last is short, so that the GPU's multiprocessors finish together. The layers of a
    step share the tensor, which is copied to the GPU once.
    """
    tiles: list[tuple[int, int, int, int]] = []
    for b in range(len(query_starts) - 1):
        first, end = query_starts[b : b + 2]
        num_before = key_starts[b + 1] - key_starts[b] - (end - first)
        tiles += [
            (tile, min(tile + block, end), key_starts[b], num_before + tile - first)
            for tile in range(first, end, block)
        ]
    tiles.sort(key=lambda tile: tile[3] + tile[1] - tile[0], reverse=True)
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 4).to(device)


@triton.jit
def _load_tile(base, row_offsets, columns, is_row, WIDTH: tl.constexpr, OPERAND: tl.constexpr):
    """Load rows x columns; zeros where `is_row` is false and past WIDTH."""
    is_inside = is_row[:, None]
    if columns.shape[0] > WIDTH:
        is_inside = is_inside & (columns < WIDTH)[None, :]
    return tl.load(base + row_offsets[:, None] + columns[None, :], mask=is_inside, other=0.0).to(OPERAND)


@triton.jit
def _add_scores(
    scores,
    q,
    query_base,
    query_offsets,
    is_query,
    key_base,
    key_offsets,
    is_key,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Add the products of queries and keys over WIDTH columns: of `q`, or if CHUNK, of pieces that are loaded here."""
    if CHUNK == 0:
        k = _load_tile(key_base, key_offsets, tl.arange(0, TILE), is_key, WIDTH, OPERAND)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    else:
        for first in tl.static_range(0, WIDTH, CHUNK):
            columns = tl.arange(0, CHUNK)
            x = _load_tile(query_base + first, query_offsets, columns, is_query, WIDTH - first, OPERAND)
            k = _load_tile(key_base + first, key_offsets, columns, is_key, WIDTH - first, OPERAND)
            scores = tl.dot(x, tl.trans(k), scores, input_precision="ieee")
    return scores


@triton.jit(do_not_specialize=["num_tiles", "heads_side_by_side"])
def _attend_kernel(
    tiles_ptr,
    query_ptr,
    key_ptr,
    tail_ptr,
    value_ptr,
    slots_ptr,
    out_ptr,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    tail_stride,
    tail_head_stride,
    value_stride,
    value_head_stride,
    num_tiles,
    num_heads,
    heads_side_by_side,
    log2_scale,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_TAIL: tl.constexpr,
    TILE_VALUE: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    first_head = program // (num_tiles * heads_side_by_side) * heads_side_by_side
    within = program % (num_tiles * heads_side_by_side)
    head = first_head + within % heads_side_by_side
    tile_ptr = tiles_ptr + within // heads_side_by_side * 4
    first_query = tl.load(tile_ptr)
    num_queries = tl.load(tile_ptr + 1) - first_query
    first_key = tl.load(tile_ptr + 2).to(tl.int64)
    first_place = tl.load(tile_ptr + 3)

    m, n, value = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, TILE_VALUE)
    is_query = m < num_queries
    query_base = query_ptr + first_query.to(tl.int64) * query_stride + head * query_head_stride
    query_offsets = m * query_stride
    q, q_tail = None, None
    if CHUNK == 0:
        width = tl.arange(0, TILE_WIDTH)
        q = _load_tile(query_base, query_offsets, width, is_query, WIDTH, OPERAND)
        if TAIL > 0:
            tail = tl.arange(0, TILE_TAIL)
            q_tail = _load_tile(query_base + WIDTH, query_offsets, tail, is_query, TAIL, OPERAND)
    group = (head // GROUP).to(tl.int64)
    key_base = key_ptr + group * key_head_stride
    tail_base = tail_ptr + group * tail_head_stride
    value_base = value_ptr + group * value_head_stride

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, TILE_VALUE], tl.float32)
    num_visible = first_place + num_queries
    # Every query of the tile sees all keys before this one.
    diagonal = (first_place + 1) // BLOCK_N * BLOCK_N
    for start in tl.range(0, num_visible, BLOCK_N):
        is_key = start + n < num_visible
        if PAGE_SIZE > 0:
            slots = tl.load(slots_ptr + first_key + start + n, mask=is_key, other=0)
            # A page's values follow its keys.
            rows = slots + slots // PAGE_SIZE * PAGE_SIZE
            first_row = tl.zeros([], tl.int64)
        else:
            rows = n
            first_row = first_key + start
        scores = _add_scores(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
            q,
            query_base,
            query_offsets,
            is_query,
            key_base + first_row * key_stride,
            rows * key_stride,
            is_key,
            WIDTH,
            TILE_WIDTH,
            CHUNK,
            OPERAND,
        )
        if TAIL > 0:
            scores = _add_scores(
                scores,
                q_tail,
                query_base + WIDTH,
                query_offsets,
                is_query,
                tail_base + first_row * tail_stride,
                rows * tail_stride,
                is_key,
                TAIL,
                TILE_TAIL,
                CHUNK,
                OPERAND,
            )
        if start >= diagonal:
            is_visible = (start + n)[None, :] <= (first_place + m)[:, None]
            scores = tl.where(is_visible, scores, float("-inf"))
        highest_now = tl.maximum(highest, tl.max(scores, axis=1) * log2_scale)
        weights = tl.exp2(scores * log2_scale - highest_now[:, None])
        correction = tl.exp2(highest - highest_now)
        total = total * correction + tl.sum(weights, axis=1)
        v = _load_tile(value_base + first_row * value_stride, rows * value_stride, value, is_key, VALUE, OPERAND)
        acc = tl.dot(weights.to(OPERAND), v, acc * correction[:, None], input_precision="ieee")
        highest = highest_now
    out_rows = (first_query + m).to(tl.int64) * num_heads + head
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    is_out = is_query[:, None] & (value < VALUE)[None, :]
    tl.store(out_ptr + out_rows[:, None] * VALUE + value[None, :], out, mask=is_out)
