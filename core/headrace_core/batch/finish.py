"""When a sequence ends: one rule for both kinds of worker."""

from __future__ import annotations

from headrace_core.batch.spec import ModelLimits
from headrace_core.request import DEFAULT_MAX_TOKENS, FinishReason, SamplingParams


class FinishRule:
    """When one sequence ends. Made once for it, so that what a token costs does not grow with the request."""

    __slots__ = ("_max_context_tokens", "_max_tokens", "_min_tokens", "_stop_ids")

    def __init__(self, params: SamplingParams, limits: ModelLimits) -> None:
        self._stop_ids = frozenset(params.stop_token_ids).union(() if params.ignore_eos else limits.eos_token_ids)
        self._min_tokens = params.min_tokens
        self._max_tokens = DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens
        self._max_context_tokens = limits.max_context_tokens

    def reason(self, token_id: int, *, num_output_tokens: int, num_tokens: int) -> FinishReason | None:
        """Return why the sequence ends with `token_id`, its newest token; None if it goes on.

        `num_output_tokens` and `num_tokens` (prompt and output) include the newest token. Stop strings are the
        router's.
        """
        if token_id in self._stop_ids and num_output_tokens > self._min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.is_length(num_output_tokens, num_tokens) else None

    def is_stop(self, token_id: int) -> bool:
        """Return whether the sequence ends with `token_id` once it has `min_tokens`."""
        return token_id in self._stop_ids

    def num_left(self, num_output_tokens: int, num_tokens: int) -> int:
        """Return how many tokens it can have more."""
        return min(self._max_tokens - num_output_tokens, self._max_context_tokens - num_tokens)

    def is_length(self, num_output_tokens: int, num_tokens: int) -> bool:
        """Return whether the sequence ends with its newest token, whichever that is."""
        return self.num_left(num_output_tokens, num_tokens) <= 0
