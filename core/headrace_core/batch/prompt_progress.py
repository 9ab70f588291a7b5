"""What is known of a prompt's log-probabilities, and what a step is to say of them. Engine thread only."""

from __future__ import annotations

from collections.abc import Sequence

from headrace_core.batch.spec import SequenceSpec
from headrace_core.batch.step import Scoring


class PromptProgress:
    """One sequence's. A token's row says what is probable in the next one's place, so it must be computed."""

    __slots__ = ("_num_known", "_num_top", "_num_wanted")

    def __init__(self, spec: SequenceSpec) -> None:
        self._num_top = spec.params.prompt_logprobs or 0
        self._num_wanted = 0 if spec.params.prompt_logprobs is None else spec.num_prompt_tokens - 1
        self._num_known = spec.num_prompt_logprobs

    def most_cached(self, num_tokens: int) -> int:
        """Return how many of a sequence's first `num_tokens` need not be computed."""
        return min(num_tokens, self._num_known) if self._num_known < self._num_wanted else num_tokens

    def scoring(self, token_ids: Sequence[int], start: int, end: int) -> Scoring | None:
        """Return what a chunk of the tokens from `start` to `end` is to say; None: nothing."""
        first, last = max(start, self._num_known), min(end, self._num_wanted)
        return Scoring(first - start, token_ids[first + 1 : last + 1], self._num_top) if first < last else None

    def take(self, num_tokens: int) -> None:
        """Take note that the next `num_tokens` are known."""
        self._num_known += num_tokens
