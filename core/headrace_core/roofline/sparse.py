"""Sparse attention, as DeepSeek-V3.2 has it: what its indexer chooses, as formulas over the symbols of `operations`.

A query's scores are over all its context; attention is over the `topk` tokens of highest score, or over all if there
are no more. Where no prompt of a step is longer than that nothing is scored, and attention is as in DeepSeek-V3.
Prompts of a step count as equally long ones, and so do sequences that decode: of a mean's `min` there is at most as
much as of any lengths with that mean.
"""

from __future__ import annotations

_ALL_BEFORE = "min(full-fresh, topk)"
_ALL_OF = "min(full, topk)"

SPARSE_SYMBOLS = {
    # Of a prompt: tokens with those in the cache, and those that are computed.
    "full": "prefill_context/max(1, prefill_sequences)",
    "fresh": "prefill_tokens/max(1, prefill_sequences)",
    # 1 where prompts are longer than what is chosen, else 0.
    "far": "min(1, topk)*min(1, ceil(max(0, full-topk)))",
    # Pairs of a query and a token it takes: all while there are few, then topk each.
    "Sp": "share*prefill_sequences*("
    f"{_ALL_OF}*({_ALL_OF}+1)/2 - {_ALL_BEFORE}*({_ALL_BEFORE}+1)/2"
    " + topk*(max(0, full-topk) - max(0, full-fresh-topk)))",
    "Sd": "min(Pd, Td*topk)",
    # Rows of the cache that are taken at least once, if queries take as different ones as they can.
    "Mp": "min(Cp, Tp*topk)",
    "Md": "min(Cd, Td*topk)",
    "key": "c*I + max(0, 2-c)*4*ceil(I/128)",
}
"""See `operations.DERIVED_SYMBOLS`; without an indexer they are 0, and no formula uses them."""

SCORE_FLOPS = "2*J*I*(far*Pp+Pd)"
SCORE_BYTES = "key*(far*Cp+Cd) + a*(far*Tp+Td)*J*I"
"""Keys of the whole context are read once, and the queries; scores do not reach memory, and choosing costs nothing."""
