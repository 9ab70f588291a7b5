"""Choose the next token of each sequence of a step.

In order: penalties, logit bias, tokens that `min_tokens` forbids, temperature, top-k, top-p, min-p, one draw. The draw
depends on (seed, sample index, position) and on the row's own logits; on nothing else in the batch and on no hidden
state, so that any worker continues a sequence as any other would have.

Letters: L rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from headrace_kernels.sampling import filter_logits, pick
from torch import Tensor

from headrace_core.engine.step import SamplingRow
from headrace_core.errors import HeadraceError
from headrace_core.model.counter_random import uniform
from headrace_core.request import SampledToken, SamplingParams, TokenLogprobs


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
    adjusted = _adjust(logits, rows)
    tokens = adjusted.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        tokens[index] = _draw(adjusted[index], [rows[i] for i in drawn])
    token_ids: list[int] = tokens.tolist()
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


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return [L] int64, drawn from `logits` [L, V]."""
    params = [row.params for row in rows]
    temperatures = _column([p.temperature for p in params], logits)
    # Relative to the best one, so that no temperature, however small, leaves the range of float64 upwards.
    scaled = logits.double()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    if any(_is_filtering(p) for p in params):
        top_k = torch.tensor([p.top_k for p in params], device=logits.device)
        top_p = _column([p.top_p for p in params], logits)
        min_p = _column([p.min_p for p in params], logits)
        scaled = filter_logits(scaled, top_k, top_p, min_p)
    numbers = [uniform(row.params.seed or 0, row.sample_index, row.position) for row in rows]
    return pick(scaled, _column(numbers, logits))


def _is_filtering(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)


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
