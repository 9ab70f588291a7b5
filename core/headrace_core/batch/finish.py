"""When a sequence ends: one rule for both kinds of worker."""

from __future__ import annotations

from headrace_core.batch.spec import ModelLimits
from headrace_core.request import DEFAULT_MAX_TOKENS, FinishReason, SamplingParams


def finish_reason(
    token_id: int, params: SamplingParams, limits: ModelLimits, *, num_output_tokens: int, num_tokens: int
) -> FinishReason | None:
    """Return why a sequence ends with `token_id`, its newest token; None if it goes on.

    `num_output_tokens` and `num_tokens` (prompt and output) include the newest token. Stop strings are the router's.
    """
    is_stop = token_id in params.stop_token_ids or (not params.ignore_eos and token_id in limits.eos_token_ids)
    if is_stop and num_output_tokens > params.min_tokens:
        return FinishReason.STOP
    max_tokens = DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens
    if num_output_tokens >= max_tokens or num_tokens >= limits.max_context_tokens:
        return FinishReason.LENGTH
    return None
