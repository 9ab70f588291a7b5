"""What one forward step has to do, as counts: tokens, context and pairs of query and key."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from headrace_core.roofline.formula import evaluate

PREFILL_LOAD = {
    "num_sequences": "batch",
    "num_logits": "batch",
    "prefill_sequences": "batch",
    "prefill_tokens": "batch*new",
    "prefill_context": "batch*(cached+new)",
    "prefill_pairs": "batch*(new*cached + new*(new+1)/2)",
}
"""A prefill step of `batch` sequences that compute `new` tokens after `cached` ones; the causal half only."""

DECODE_LOAD = {
    "num_sequences": "batch",
    "num_logits": "batch*new",
    "decode_tokens": "batch*new",
    "decode_context": "context_total",
    "decode_pairs": "new*context_total",
}
"""A decode step of `batch` sequences that have `context_total` tokens together."""


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one forward step of a worker, all its GPUs, has to do. Sums of `+`.

    A pair is a query and a key it attends to. Prefill's part runs naive MLA, decode's absorbed, unless told otherwise.
    """

    num_sequences: float = 0
    num_logits: float = 0
    prefill_sequences: float = 0
    prefill_tokens: float = 0
    prefill_context: float = 0
    prefill_pairs: float = 0
    decode_tokens: float = 0
    decode_context: float = 0
    decode_pairs: float = 0

    @classmethod
    def prefill(
        cls, new_tokens: int, cached_tokens: int = 0, *, batch: int = 1, has_all_logits: bool = False
    ) -> StepLoad:
        """Return the load of `batch` prompts or chunks of `new_tokens` that follow `cached_tokens` in the cache."""
        symbols = {"batch": batch, "new": new_tokens, "cached": cached_tokens}
        values = dict(zip(PREFILL_LOAD, evaluate(tuple(PREFILL_LOAD.values()), symbols), strict=True))
        return cls(**(values | {"num_logits": batch * new_tokens} if has_all_logits else values))

    @classmethod
    def decode(cls, batch: int, context_tokens_total: float, *, new_tokens: int = 1) -> StepLoad:
        """Return the load of one decode step of `batch` sequences that have `context_tokens_total` tokens together."""
        symbols = {"batch": batch, "new": new_tokens, "context_total": context_tokens_total}
        return cls(**dict(zip(DECODE_LOAD, evaluate(tuple(DECODE_LOAD.values()), symbols), strict=True)))

    def __add__(self, other: StepLoad) -> StepLoad:
        """Return the load of a step that does both."""
        return StepLoad(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))
