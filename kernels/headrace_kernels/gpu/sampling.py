"""`headrace_kernels.sampling.sample_tokens` in Triton: one launch, one program a row, nothing sorted.

A row's first pass finds its best logit. A threshold, of top-k or top-p, is the highest value at or above which there is
enough: k tokens, or a share of the mass. It is searched among float32's own values, which are finitely many integers in
their order, by a few pivots a pass over the row. After the first such pass the tokens that may still be kept are
listed, in the order of the vocabulary. The rest of the search and the draw go over the list, or over the row if there
are too many to list. The draw sums the mass that is left and goes to the tile where the number is passed.

Masses are float64 wherever they are computed: what is saved is computing them, nothing is decided by a rounded one.
Sums are in an order that the row's own logits and the size of the vocabulary decide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.draws import NO_TOKEN, Draws
from headrace_kernels.gpu.configs import Config, config
from headrace_kernels.gpu.launch import launch, target

DEFAULT_CONFIG: Config = {
    "BLOCK_V": 2048,
    "BLOCK_PIVOTS": 512,
    "NUM_PIVOTS": 8,
    "CAPACITY": 16384,
    "num_warps": 8,
    "num_stages": 2,
}
_NO_TOKEN = tl.constexpr(NO_TOKEN)
# Said at each loop: only then are loads that feed no matrix product started some rounds ahead.
_AHEAD = tl.constexpr(4)


def sample_tokens(logits: Tensor, draws: Draws) -> Tensor:
    """See `headrace_kernels.sampling.sample_tokens`."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_rows, vocab_size = logits.shape
    tokens = torch.empty((num_rows,), dtype=torch.int64, device=logits.device)
    tiles = config("sampling", f"{vocab_size}", default_config(), logits)
    if target() == "hip":
        # There a barrier alone does not let one wave read what another stored: see `moe_router`.
        tiles = {**tiles, "CAPACITY": 0}
    values, ids = (
        torch.empty((num_rows, tiles["CAPACITY"]), dtype=dtype, device=logits.device)
        for dtype in (torch.float32, torch.int32)
    )
    columns = (
        draws.temperatures,
        draws.top_k,
        draws.top_p,
        draws.min_p,
        draws.seeds,
        draws.sample_indices,
        draws.positions,
    )
    launch(
        _sample_kernel,
        (num_rows,),
        logits,
        logits.stride(0),
        vocab_size,
        *(column.contiguous() for column in columns),
        tokens,
        values,
        ids,
        TILES=triton.next_power_of_2(triton.cdiv(vocab_size, tiles["BLOCK_V"])),
        **tiles,
    )
    return tokens


def default_config() -> Config:
    """Return the tiles where none were measured."""
    # A lane of a gfx942 would spill what it holds of 512 columns and 8 pivots, with Triton 3.6.
    return {**DEFAULT_CONFIG, "BLOCK_PIVOTS": 256} if target() == "hip" else DEFAULT_CONFIG


@triton.jit
def _ordered(x):
    """Return float32's bits as int32 in the order of the values; its own inverse on the bits."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """Return the float32 whose `_ordered` is `key`, an int64 in int32's range."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(x, best, temperature):
    return (x.to(tl.float64) - best.to(tl.float64)) / temperature


@triton.jit
def _uniform(seed, sample_index, position):
    """`headrace_kernels.counter_random.uniform` of one row."""
    zero = tl.zeros([], tl.uint32)
    words = tl.philox(seed, position.to(tl.uint32), sample_index.to(tl.uint32), zero, zero)
    mantissa = (words[0].to(tl.int64) << 21) | (words[1].to(tl.int64) >> 11)
    return mantissa.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _extremes(row_ptr, vocab_size, BLOCK_V: tl.constexpr):
    """Return the highest logit, the first token that has it, the lowest finite logit, and if one is NaN or +inf."""
    n = tl.arange(0, BLOCK_V)
    highest = tl.full([BLOCK_V], float("-inf"), tl.float32)
    tokens = n
    lowest = tl.full([BLOCK_V], float("inf"), tl.float32)
    num_bad = tl.zeros([BLOCK_V], tl.int32)
    for start in tl.range(0, vocab_size, BLOCK_V, num_stages=_AHEAD):
        x = tl.load(row_ptr + start + n, mask=start + n < vocab_size, other=float("-inf"))
        tokens = tl.where(x > highest, start + n, tokens)
        highest = tl.where(x > highest, x, highest)
        lowest = tl.where((x > float("-inf")) & (x < lowest), x, lowest)
        num_bad += tl.where(x < float("inf"), 0, 1)  # a NaN is below nothing
    best = tl.max(highest, axis=0)
    token = tl.min(tl.where(highest == best, tokens, 0x7FFFFFFF), axis=0)
    return best, token, tl.min(lowest, axis=0), tl.max(num_bad, axis=0) > 0


@triton.jit
def _pivots(low, high, lowest, j, is_by_value, NUM_PIVOTS: tl.constexpr):
    """Return [NUM_PIVOTS] keys inside (low, high): evenly spaced as values, or as keys."""
    by_key = low + (high - low) * (j + 1) // (NUM_PIVOTS + 1)
    first = tl.maximum(_value(low), lowest).to(tl.float64)
    last = _value(high - 1).to(tl.float64)
    by_value = _ordered((first + (last - first) * (j + 1) / (NUM_PIVOTS + 1)).to(tl.float32)).to(tl.int64)
    pivots = tl.where(is_by_value, by_value, by_key)
    return tl.minimum(tl.maximum(pivots, low + 1), high - 1)


@triton.jit
def _weigh(
    row_ptr,
    size,
    best,
    temperature,
    pivots,
    low,
    high,
    IS_MASS: tl.constexpr,
    BLOCK_PIVOTS: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):
    """Weigh `size` logits: by mass relative to the best one's, in float64, or 1 each.

    Returns what those at or above each pivot weigh, what all weigh, and the least key from `low` on and the greatest
    below `high` that one of them has.
    """
    DTYPE: tl.constexpr = tl.float64 if IS_MASS else tl.int32
    n = tl.arange(0, BLOCK_PIVOTS)
    above = tl.zeros([BLOCK_PIVOTS, NUM_PIVOTS], DTYPE)
    total = tl.zeros([BLOCK_PIVOTS], DTYPE)
    least = tl.full([BLOCK_PIVOTS], 0x7FFFFFFF, tl.int32)
    most = tl.full([BLOCK_PIVOTS], -0x7FFFFFFF, tl.int32)
    for start in tl.range(0, size, BLOCK_PIVOTS, num_stages=_AHEAD):
        is_token = start + n < size
        x = tl.load(row_ptr + start + n, mask=is_token, other=float("-inf"))
        keys = _ordered(x)
        weights = is_token.to(tl.int32)
        if IS_MASS:
            weights = tl.where(is_token, tl.exp(_scaled(x, best, temperature)), 0.0)
        total += weights
        is_above = keys[:, None] >= pivots.to(tl.int32)[None, :]
        above += tl.where(is_above, weights[:, None], tl.zeros([1, 1], DTYPE))
        least = tl.where(is_token & (keys >= low), tl.minimum(least, keys), least)
        most = tl.where(is_token & (keys < high), tl.maximum(most, keys), most)
    first, last = tl.min(least, axis=0).to(tl.int64), tl.max(most, axis=0).to(tl.int64)
    return tl.sum(above, axis=0), tl.sum(total, axis=0), first, last


@triton.jit
def _closer(pivots, is_enough, low, high, first, last):
    """Return `low` and `high` moved to the pivots around the threshold, past keys that no token has."""
    low = tl.maximum(tl.max(tl.where(is_enough, pivots, low), axis=0), first)
    high = tl.maximum(tl.minimum(tl.min(tl.where(is_enough, high, pivots), axis=0), last + 1), low + 1)
    return low, high


@triton.jit
def _first_pass(
    row_ptr,
    size,
    best,
    lowest,
    temperature,
    low,
    high,
    asked,
    IS_MASS: tl.constexpr,
    BLOCK_PIVOTS: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):
    """Return `low` and `high` around the threshold after one pass, and `asked`, a number or a share of all."""
    pivots = _pivots(low, high, lowest, tl.arange(0, NUM_PIVOTS).to(tl.int64), True, NUM_PIVOTS)
    above, total, first, last = _weigh(
        row_ptr, size, best, temperature, pivots, low, high, IS_MASS, BLOCK_PIVOTS, NUM_PIVOTS
    )
    needed = asked * total if IS_MASS else asked
    low, high = _closer(pivots, above >= needed, low, high, first, last)
    return low, high, needed


@triton.jit
def _threshold(
    row_ptr,
    size,
    best,
    lowest,
    temperature,
    low,
    high,
    num_passes,
    needed,
    IS_MASS: tl.constexpr,
    BLOCK_PIVOTS: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):
    """Return the highest key below `high` whose tokens and better ones weigh `needed`; `low` if none above it does."""
    j = tl.arange(0, NUM_PIVOTS).to(tl.int64)
    while high - low > 1:
        # Logits lie close in value; keys alone would spend passes on the exponents around zero.
        pivots = _pivots(low, high, lowest, j, num_passes < 2, NUM_PIVOTS)
        above, _, first, last = _weigh(
            row_ptr, size, best, temperature, pivots, low, high, IS_MASS, BLOCK_PIVOTS, NUM_PIVOTS
        )
        low, high = _closer(pivots, above >= needed, low, high, first, last)
        num_passes += 1
    return low


@triton.jit
def _list_from(row_ptr, vocab_size, low, values_ptr, ids_ptr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr):
    """Write the logits whose key is `low` or higher, and their tokens, in order; return how many there are.

    Nothing is written past CAPACITY.
    """
    n = tl.arange(0, BLOCK)
    count = 0
    for start in tl.range(0, vocab_size, BLOCK, num_stages=_AHEAD):
        is_token = start + n < vocab_size
        x = tl.load(row_ptr + start + n, mask=is_token, other=float("-inf"))
        is_kept = is_token & (_ordered(x) >= low)
        ends = count + tl.cumsum(is_kept.to(tl.int32), axis=0)
        is_written = is_kept & (ends <= CAPACITY)
        tl.store(values_ptr + ends - 1, x, mask=is_written)
        tl.store(ids_ptr + ends - 1, start + n, mask=is_written)
        count = tl.max(ends, axis=0)
    # The program's other threads read what each wrote.
    tl.debug_barrier()
    return count


@triton.jit
def _masses(x, best, temperature, floor):
    """Return float64: each logit's mass relative to the best one's, 0 if it is scaled below `floor`."""
    scaled = _scaled(x, best, temperature)
    return tl.where(scaled >= floor, tl.exp(scaled), 0.0)


@triton.jit
def _mass(row_ptr, size, best, temperature, floor, BLOCK_V: tl.constexpr, TILES: tl.constexpr):
    """Return the sum of the masses [TILES] up to the end of each tile of the logits, 0 past the last, and of all."""
    n = tl.arange(0, BLOCK_V)
    tile = tl.arange(0, TILES)
    ends = tl.zeros([TILES], tl.float64)
    total = tl.zeros([], tl.float64)
    for start in tl.range(0, size, BLOCK_V, num_stages=_AHEAD):
        x = tl.load(row_ptr + start + n, mask=start + n < size, other=float("-inf"))
        total += tl.sum(_masses(x, best, temperature, floor), axis=0)
        ends = tl.where(tile == start // BLOCK_V, total, ends)
    return ends, total


@triton.jit
def _pick(row_ptr, size, best, temperature, floor, number, BLOCK_V: tl.constexpr, TILES: tl.constexpr):
    """Return the place at which the cumulative mass passes `number` of the whole."""
    n = tl.arange(0, BLOCK_V)
    tile = tl.arange(0, TILES)
    ends, total = _mass(row_ptr, size, best, temperature, floor, BLOCK_V, TILES)
    # Rounding may bring the target up to the total, where no token is left.
    below = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
    target = tl.minimum(number * total, below)
    # The best logit has mass 1, so the total is above the target, and so is the end of some tile.
    found = tl.min(tl.where(ends > target, tile, TILES - 1), axis=0)
    passed = tl.sum(tl.where(tile == found - 1, ends, 0.0), axis=0)
    places = found * BLOCK_V + n
    x = tl.load(row_ptr + places, mask=places < size, other=float("-inf"))
    masses = _masses(x, best, temperature, floor)
    is_past = (passed + tl.cumsum(masses, axis=0) > target) & (masses > 0)
    first = tl.min(tl.where(is_past, places, 0x7FFFFFFF), axis=0)
    # The scan rounds in another order than the sum and may just miss the target.
    return tl.minimum(first, tl.max(tl.where(masses > 0, places, 0), axis=0))


@triton.jit
def _sample_kernel(
    logits_ptr,
    logits_stride,
    vocab_size,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    sample_indices_ptr,
    positions_ptr,
    tokens_ptr,
    values_ptr,
    ids_ptr,
    NUM_PIVOTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_PIVOTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr, size = logits_ptr + row * logits_stride, vocab_size
    best, token, lowest, is_bad = _extremes(row_ptr, vocab_size, BLOCK_V)
    is_answerable = (best > float("-inf")) & (not is_bad)
    temperature = tl.load(temperatures_ptr + row)
    if (temperature > 0) & is_answerable:
        top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        is_cut, is_nucleus = (top_k > 0) & (top_k < vocab_size), top_p < 1
        least_key = _ordered(tl.full([], float("-inf"), tl.float32)).to(tl.int64)
        low, high, end_key = least_key, _ordered(best).to(tl.int64) + 1, _ordered(best).to(tl.int64) + 1
        needed = tl.zeros([], tl.float64)
        is_listed = False
        if is_cut | is_nucleus:
            if is_cut:
                low, high, _ = _first_pass(
                    row_ptr, size, best, lowest, temperature, low, high, top_k, False, BLOCK_PIVOTS, NUM_PIVOTS
                )
            else:
                low, high, needed = _first_pass(
                    row_ptr, size, best, lowest, temperature, low, high, top_p, True, BLOCK_PIVOTS, NUM_PIVOTS
                )
            if CAPACITY > 0:
                row_values_ptr, row_ids_ptr = values_ptr + row * CAPACITY, ids_ptr + row * CAPACITY
                count = _list_from(row_ptr, size, low, row_values_ptr, row_ids_ptr, CAPACITY, 2 * BLOCK_V)
                is_listed = count <= CAPACITY
                if is_listed:
                    row_ptr, size = row_values_ptr, count
        key = least_key
        num_passes = tl.full([], 1, tl.int32)
        if is_cut:
            key = _threshold(
                row_ptr, size, best, lowest, temperature, low, high, num_passes, top_k, False, BLOCK_PIVOTS, NUM_PIVOTS
            )
            low, high, num_passes = key, end_key, tl.full([], 0, tl.int32)
        floor = _scaled(_value(key), best, temperature)
        if is_nucleus:
            if is_cut:
                _, total = _mass(row_ptr, size, best, temperature, floor, BLOCK_V, TILES)
                needed = top_p * total
            key = _threshold(
                row_ptr, size, best, lowest, temperature, low, high, num_passes, needed, True, BLOCK_PIVOTS, NUM_PIVOTS
            )
            floor = _scaled(_value(key), best, temperature)
        if min_p > 0:
            floor = tl.maximum(floor, tl.log(min_p))
        number = _uniform(tl.load(seeds_ptr + row), tl.load(sample_indices_ptr + row), tl.load(positions_ptr + row))
        token = _pick(row_ptr, size, best, temperature, floor, number, BLOCK_V, TILES)
        if is_listed:
            token = tl.load(ids_ptr + row * CAPACITY + token)
    tl.store(tokens_ptr + row, tl.where(is_answerable, token, _NO_TOKEN).to(tl.int64))
