"""Before a worker serves from a GPU: do its kernels compute what plain torch computes there?

A few tokens go through the loaded network three ways: plain torch, the kernels, and the kernels from the fixed buffers
that captured decode steps have. A kernel that is wrong on some GPU, driver or compiler would give wrong tokens in
silence; so the worker does not start.
"""

from __future__ import annotations

import torch
from headrace_kernels import use_backend
from headrace_kernels.finite import is_finite
from torch import Tensor

from headrace_core.batch.step import Chunk
from headrace_core.errors import CheckpointError, StartupError
from headrace_core.kv.layout import CacheDtype
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.model import Model

# Relative to the logits' norm. Types round differently in different orders, and an expert that was nearly tied may be
# chosen here and not there: 27 layers of random bfloat16 weights differ from their own float32 by 0.125. Logits of a
# kernel that is wrong have little to do with the right ones: unrelated ones differ by 1.4.
_LIMITS = {torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 0.25}
# Two latents that differ in their last bit may be two numbers of fp8, an eighth apart.
_FP8_LIMIT = 0.25
_TOKENS_PAST_A_PAGE = 4
# More rows than go by their experts without sorting; then fewer.
_NUM_SEQUENCES = (6, 2)


def check_kernels(model: Model, device: str, page_size: int = 16, *, num_lanes: int = 1) -> float:
    """Return the largest relative difference found, with pages of `page_size` tokens.

    In a group of ranks all call it. Each lane computes some of the sequences, and rank 0 compares for all.

    Raises:
        CheckpointError: BAD_LOGITS, see `check_finite`.
        StartupError: NO_KERNEL, the kernels do not take this network or page size; KERNELS_DISAGREE, a difference is
            too large or not a number.
    """
    with use_backend("reference"):
        expected = _logits(model, device, page_size, num_lanes)
    check_finite(expected)
    try:
        found = [
            _logits(model, device, page_size, num_lanes),
            _logits(model, device, page_size, num_lanes, is_captured=True),
        ]
    except ValueError as error:
        raise StartupError(
            "NO_KERNEL",
            f"the GPU's kernels do not take this network with --page-size {page_size}: {error}; use --device cpu",
        ) from error
    if not len(expected):
        return 0.0
    # torch's maximum, for which a NaN is the largest; Python's takes whichever number stands before it.
    worst = float(torch.stack([_difference(each, expected) for each in found]).max())
    limit = _FP8_LIMIT if model.cache_dtype is CacheDtype.FP8_E4M3 else _LIMITS[model.dtype]
    if not worst <= limit:
        raise StartupError(
            "KERNELS_DISAGREE",
            f"on this GPU ({_name(device)}) kernels and plain torch disagree by {worst:.2g} of the logits, more than "
            f"{limit:g}: it would answer wrongly; use --device cpu, and report GPU, driver, torch "
            f"{torch.__version__} and triton versions",
        )
    return worst


def _logits(model: Model, device: str, page_size: int, num_lanes: int, *, is_captured: bool = False) -> Tensor:
    """Return logits, [.., V]: after each sequence's prompt, then after a token of all, then after one of a few.

    Of a group they are rank 0's; the others have [0, V].
    """
    num_tokens, pages = page_size + _TOKENS_PAST_A_PAGE, 2
    most, few = _NUM_SEQUENCES
    cache = KvCache(model.kv_layout(page_size), most * pages, device)
    vocab_size = model.config.vocab_size

    def chunks(num_sequences: int, start: int, count: int) -> list[Chunk]:
        return [
            Chunk(
                key,
                [(7919 * (key + 1) * (position + 1)) % vocab_size for position in range(start, start + count)],
                start,
                list(range(key * pages, (key + 1) * pages)),
                is_sampled=True,
                lane=key % num_lanes,
            )
            for key in range(num_sequences)
        ]

    prompt = model.forward(chunks(most, 0, num_tokens), cache)
    if is_captured:
        model.prepare_decode(cache, max_rows=most, max_context_tokens=num_tokens + 2, capture=lambda run: run)
    try:
        # A captured step's logits lie where the next one's will.
        after_all = model.forward(chunks(most, num_tokens, 1), cache).clone()
        return torch.cat((prompt, after_all, model.forward(chunks(few, num_tokens + 1, 1), cache)))
    finally:
        model.forget_decode()


def check_finite(logits: Tensor) -> None:
    """Refuse a network that can't compute the few tokens that it is tried with.

    Raises:
        CheckpointError: BAD_LOGITS, one of `logits` is NaN or infinite.
    """
    if not is_finite(logits):
        raise CheckpointError(
            "BAD_LOGITS",
            "the network's logits for the tokens it was tried with are not all finite; compare the checkpoint's files "
            "with their source, and with --dtype float16 try bfloat16, which reaches farther",
        )


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).norm() / expected.norm()


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device
