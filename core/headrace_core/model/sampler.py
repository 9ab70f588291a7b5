"""Choose the next token of each sequence of a step.

In order: penalties, logit bias, tokens that `min_tokens` forbids, temperature, top-k, top-p, min-p, one draw. The draw
depends on (seed, sample index, position) and on the row's own logits; on nothing else in the batch and on no hidden
state, so that any worker continues a sequence as any other would have.

Letters: L rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from headrace_kernels.draws import Draws
from headrace_kernels.sampling import sample_tokens
from torch import Tensor

from headrace_core.batch.step import SamplingRow
from headrace_core.errors import HeadraceError
from headrace_core.request import SampledToken, TokenLogprobs


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Return each row's next token.

    Args:
        logits: [L, V] float32, the model's own; not changed.
        rows: what each row's choice depends on.

    Raises:
        HeadraceError: BAD_LOGITS if any logit is not finite; the message names the rows.
        ValueError: the number of rows differs.
    """
    if len(logits) != len(rows):
        raise ValueError(f"logits {tuple(logits.shape)} do not fit {len(rows)} rows")
    if not rows:
        return []
    _check_finite(logits)
    token_ids: list[int] = sample_tokens(_adjust(logits, rows), _draws(rows, logits.device)).tolist()
    logprobs = _logprobs(logits, token_ids, rows)
    return [SampledToken(token_id, logprobs.get(i)) for i, token_id in enumerate(token_ids)]


def _check_finite(logits: Tensor) -> None:
    # A sum over finite float32 logits of real size is finite; only when it is not is each row looked at.
    if bool(logits.sum().isfinite()):
        return
    is_bad = ~logits.isfinite().all(dim=-1)
    if bool(is_bad.any()):
        bad_rows = is_bad.nonzero()[:, 0].tolist()
        raise HeadraceError("BAD_LOGITS", f"the model's logits of rows {bad_rows} of the step are not finite")


def _adjust(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return logits with penalties, bias and bans; the input itself if no row asks for any."""
    touched = [i for i, row in enumerate(rows) if _needs_adjusting(row)]
    if not touched:
        return logits
    logits = logits.clone()
    for i in touched:
        _adjust_row(logits[i], rows[i])
    return logits


def _needs_adjusting(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or len(row.output_token_ids) < params.min_tokens
    )


def _adjust_row(logits: Tensor, row: SamplingRow) -> None:
    """Change `logits` [V] in place; works on the tokens concerned only.

    Source: transformers RepetitionPenaltyLogitsProcessor; OpenAI API reference, "frequency and presence penalties".
    """
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(row.prompt_token_ids + row.output_token_ids, device=logits.device).unique()
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if row.output_token_ids and (params.presence_penalty or params.frequency_penalty):
        output = torch.tensor(row.output_token_ids, device=logits.device)
        tokens, counts = output.unique(return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[tokens] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if len(row.output_token_ids) < params.min_tokens:
        banned = [*row.eos_token_ids, *params.stop_token_ids]
        if banned:
            logits[torch.tensor(banned, device=logits.device)] = float("-inf")


def _draws(rows: Sequence[SamplingRow], device: torch.device) -> Draws:
    """Return how each row chooses, as columns on `device`."""
    params = [row.params for row in rows]

    def column(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Draws(
        temperatures=column([0.0 if p.is_greedy else p.temperature for p in params], torch.float64),
        top_k=column([p.top_k for p in params], torch.int64),
        top_p=column([p.top_p for p in params], torch.float64),
        min_p=column([p.min_p for p in params], torch.float64),
        seeds=column([_signed(p.seed or 0) for p in params], torch.int64),
        sample_indices=column([row.sample_index for row in rows], torch.int64),
        positions=column([row.position for row in rows], torch.int64),
    )


def _signed(seed: int) -> int:
    """Return the signed integer that has the 64 bits of `seed`."""
    return seed - (1 << 64) if seed >> 63 else seed


def _logprobs(logits: Tensor, token_ids: list[int], rows: Sequence[SamplingRow]) -> dict[int, TokenLogprobs]:
    """Return the log-probabilities of the rows that ask for them, by row."""
    asking = [i for i, row in enumerate(rows) if row.params.top_logprobs is not None]
    if not asking:
        return {}
    all_logprobs = logits[torch.tensor(asking, device=logits.device)].log_softmax(dim=-1)
    most = max(rows[i].params.top_logprobs or 0 for i in asking)
    best = all_logprobs.topk(min(most, logits.shape[1]), dim=-1)
    values, tokens = best.values.tolist(), best.indices.tolist()
    found: dict[int, TokenLogprobs] = {}
    for place, i in enumerate(asking):
        count = rows[i].params.top_logprobs or 0
        top = tuple(zip(tokens[place][:count], values[place][:count], strict=True))
        found[i] = TokenLogprobs(float(all_logprobs[place, token_ids[i]]), top)
    return found
