"""`headrace_kernels.sampling.sample_tokens` in Triton: one launch, one program a row, nothing sorted.

A row's first pass finds its best logit. A threshold, of top-k or top-p, is the highest value at or above which there is
enough: k tokens, or a share of the mass. It is searched among float32's own values, which are finitely many integers in
their order, by a few pivots a pass over the row. The draw sums the mass that is left, then walks to the number. Sums
are in float64 and in an order that only the size of the vocabulary decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.draws import NO_TOKEN, Draws
from headrace_kernels.gpu.configs import Config, config
from headrace_kernels.gpu.launch import launch

DEFAULT_CONFIG: Config = {"BLOCK_V": 2048, "BLOCK_PIVOTS": 512, "NUM_PIVOTS": 8, "num_warps": 8, "num_stages": 2}
_NO_TOKEN = tl.constexpr(NO_TOKEN)
# Said at each loop: only then are loads that feed no matrix product started some rounds ahead.
_AHEAD = tl.constexpr(4)


def sample_tokens(logits: Tensor, draws: Draws) -> Tensor:
    """See `headrace_kernels.sampling.sample_tokens`."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_rows, vocab_size = logits.shape
    tokens = torch.empty((num_rows,), dtype=torch.int64, device=logits.device)
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
        **config("sampling", f"{vocab_size}", DEFAULT_CONFIG, logits),
    )
    return tokens


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
def _weights(x, is_token, best, temperature, IS_MASS: tl.constexpr):
    """Return float64: what each token counts, its mass relative to the best one's, or 1."""
    if IS_MASS:
        return tl.where(is_token, tl.exp(_scaled(x, best, temperature)), 0.0)
    else:
        return is_token.to(tl.float64)


@triton.jit
def _threshold(
    row_ptr,
    vocab_size,
    best,
    lowest,
    temperature,
    low,
    needed,
    IS_MASS: tl.constexpr,
    BLOCK_PIVOTS: tl.constexpr,
    NUM_PIVOTS: tl.constexpr,
):
    """Return the highest key whose tokens and better ones weigh at least `needed`; `low` if none above it does."""
    n, j = tl.arange(0, BLOCK_PIVOTS), tl.arange(0, NUM_PIVOTS).to(tl.int64)
    high = _ordered(best).to(tl.int64) + 1
    num_passes = 0
    while high - low > 1:
        # Logits lie close in value; keys alone would spend passes on the exponents around zero.
        pivots = _pivots(low, high, lowest, j, num_passes < 2, NUM_PIVOTS)
        weighed = tl.zeros([BLOCK_PIVOTS, NUM_PIVOTS], tl.float64)
        least = tl.full([BLOCK_PIVOTS], 0x7FFFFFFF, tl.int32)
        most = tl.full([BLOCK_PIVOTS], -0x7FFFFFFF, tl.int32)
        for start in tl.range(0, vocab_size, BLOCK_PIVOTS, num_stages=_AHEAD):
            is_token = start + n < vocab_size
            x = tl.load(row_ptr + start + n, mask=is_token, other=float("-inf"))
            keys = _ordered(x)
            weights = _weights(x, is_token, best, temperature, IS_MASS)
            weighed += tl.where(keys[:, None] >= pivots.to(tl.int32)[None, :], weights[:, None], 0.0)
            least = tl.where(is_token & (keys >= low), tl.minimum(least, keys), least)
            most = tl.where(is_token & (keys < high), tl.maximum(most, keys), most)
        is_enough = tl.sum(weighed, axis=0) >= needed
        # Keys that no token has are skipped: the ends move on to the next ones that some token has.
        first, last = tl.min(least, axis=0).to(tl.int64), tl.max(most, axis=0).to(tl.int64)
        low = tl.maximum(tl.max(tl.where(is_enough, pivots, low), axis=0), first)
        high = tl.maximum(tl.minimum(tl.min(tl.where(is_enough, high, pivots), axis=0), last + 1), low + 1)
        num_passes += 1
    return low


@triton.jit
def _mass(row_ptr, vocab_size, best, temperature, floor, BLOCK_V: tl.constexpr):
    """Return the float64 sum of the masses of the tokens whose scaled logit is at least `floor`."""
    n = tl.arange(0, BLOCK_V)
    total = tl.zeros([], tl.float64)
    for start in tl.range(0, vocab_size, BLOCK_V, num_stages=_AHEAD):
        x = tl.load(row_ptr + start + n, mask=start + n < vocab_size, other=float("-inf"))
        scaled = _scaled(x, best, temperature)
        total += tl.sum(tl.where(scaled >= floor, tl.exp(scaled), 0.0), axis=0)
    return total


@triton.jit
def _pick(row_ptr, vocab_size, best, temperature, floor, number, token, BLOCK_V: tl.constexpr):
    """Return the token at which the cumulative mass passes `number` of the whole; `token` if none does."""
    n = tl.arange(0, BLOCK_V)
    total = _mass(row_ptr, vocab_size, best, temperature, floor, BLOCK_V)
    # Rounding may bring the target up to the total, where no token is left.
    below = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
    target = tl.minimum(number * total, below)
    passed = tl.zeros([], tl.float64)
    is_found = False
    start = 0
    while (start < vocab_size) & (not is_found):
        x = tl.load(row_ptr + start + n, mask=start + n < vocab_size, other=float("-inf"))
        scaled = _scaled(x, best, temperature)
        masses = tl.where(scaled >= floor, tl.exp(scaled), 0.0)
        mass = tl.sum(masses, axis=0)
        is_found = passed + mass > target
        if is_found:
            is_past = (passed + tl.cumsum(masses, axis=0) > target) & (masses > 0)
            first = tl.min(tl.where(is_past, start + n, 0x7FFFFFFF), axis=0)
            # The scan rounds in another order than the sum and may just miss the target.
            token = tl.minimum(first, tl.max(tl.where(masses > 0, start + n, 0), axis=0))
        passed += mass
        start += BLOCK_V
    return token


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
    NUM_PIVOTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_PIVOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    best, token, lowest, is_bad = _extremes(row_ptr, vocab_size, BLOCK_V)
    is_answerable = (best > float("-inf")) & (not is_bad)
    temperature = tl.load(temperatures_ptr + row)
    if (temperature > 0) & is_answerable:
        key = _ordered(tl.full([], float("-inf"), tl.float32)).to(tl.int64)
        top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        if (top_k > 0) & (top_k < vocab_size):
            needed = top_k.to(tl.float64)
            key = _threshold(
                row_ptr, vocab_size, best, lowest, temperature, key, needed, False, BLOCK_PIVOTS, NUM_PIVOTS
            )
        floor = _scaled(_value(key), best, temperature)
        if top_p < 1:
            needed = top_p * _mass(row_ptr, vocab_size, best, temperature, floor, BLOCK_V)
            key = _threshold(
                row_ptr, vocab_size, best, lowest, temperature, key, needed, True, BLOCK_PIVOTS, NUM_PIVOTS
            )
            floor = _scaled(_value(key), best, temperature)
        if min_p > 0:
            floor = tl.maximum(floor, tl.log(min_p))
        number = _uniform(tl.load(seeds_ptr + row), tl.load(sample_indices_ptr + row), tl.load(positions_ptr + row))
        token = _pick(row_ptr, vocab_size, best, temperature, floor, number, token, BLOCK_V)
    tl.store(tokens_ptr + row, tl.where(is_answerable, token, _NO_TOKEN).to(tl.int64))
