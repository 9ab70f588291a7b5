"""Choose the next token of each sequence of a step, or say why it has none.

In order: penalties, logit bias, tokens that `min_tokens` forbids, temperature, top-k, top-p, min-p, one draw. The draw
depends on (seed, sample index, position) and on the row's own logits; on nothing else in the batch and on no hidden
state, so that any worker continues a sequence as any other would have.

A token is in the vocabulary and its logit was finite after all that changed it: never a forbidden one. Where that
leaves nothing, or the model's own logits are not all finite, the row has an error in its place, and the others theirs.

Letters: L rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from headrace_kernels.draws import Draws
from headrace_kernels.sampling import sample_tokens
from torch import Tensor

from headrace_core.batch.step import SamplingRow
from headrace_core.errors import HeadraceError, InvalidRequestError
from headrace_core.model.logit_changes import change_logits, needs_changes
from headrace_core.request import SampledToken, TokenLogprobs

_NOT_FINITE = -2
"""Besides `NO_TOKEN`: the model's own logits are not finite."""


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | HeadraceError]:
    """Return each row's next token, or why it has none.

    The error is BAD_LOGITS if the row's logits are not all finite, as they come or after penalties and bias; an
    InvalidRequestError BAD_SAMPLING if every token is forbidden.

    Args:
        logits: [L, V] float32, the model's own; not changed.
        rows: what each row's choice depends on; what their memos keep is brought up to date.

    Raises:
        ValueError: the number of rows differs.
    """
    if len(logits) != len(rows):
        raise ValueError(f"logits {tuple(logits.shape)} do not fit {len(rows)} rows")
    if not rows:
        return []
    # A NaN wins both comparisons.
    is_finite = logits.amin(dim=-1).isfinite() & logits.amax(dim=-1).isfinite()
    changed = _changed(logits, rows)
    tokens = sample_tokens(changed, _draws(rows, logits.device))
    token_ids: list[int] = torch.where(is_finite, tokens, _NOT_FINITE).tolist()
    logprobs = _logprobs(logits, token_ids, rows)
    return [
        SampledToken(token_id, logprobs.get(i))
        if 0 <= token_id < logits.shape[1]
        else _error(token_id, changed[i], row)
        for i, (token_id, row) in enumerate(zip(token_ids, rows, strict=True))
    ]


def _changed(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return logits with what the rows ask to be changed in theirs; the input itself if none asks for anything."""
    touched = [i for i, row in enumerate(rows) if needs_changes(row)]
    if not touched:
        return logits
    logits = logits.clone()
    for i in touched:
        change_logits(logits[i], rows[i])
    return logits


def _error(token_id: int, changed: Tensor, row: SamplingRow) -> HeadraceError:
    """Return why the row has no token; `changed` [V] are its logits after penalties, bias and bans."""
    if token_id != _NOT_FINITE and bool(changed.isneginf().all()):
        return InvalidRequestError(
            "BAD_SAMPLING",
            f"no token can be chosen at position {row.position}: min_tokens forbids every one; name fewer "
            "stop_token_ids",
        )
    when = "" if token_id == _NOT_FINITE else " after penalties and bias"
    return HeadraceError(
        "BAD_LOGITS",
        f"the model's logits for position {row.position} are not all finite{when}, so no token can be chosen; the "
        "checkpoint may be damaged: compare its files with their source",
    )


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
    asking = [i for i, row in enumerate(rows) if row.params.top_logprobs is not None and token_ids[i] >= 0]
    if not asking:
        return {}
    all_logprobs = logits[torch.tensor(asking, device=logits.device)].log_softmax(dim=-1)
    # Of logits as far apart as float32 goes, the logarithm overflows; no client expects an infinity.
    all_logprobs = all_logprobs.clamp_(min=torch.finfo(torch.float32).min)
    most = max(rows[i].params.top_logprobs or 0 for i in asking)
    best = all_logprobs.topk(min(most, logits.shape[1]), dim=-1)
    values, tokens = best.values.tolist(), best.indices.tolist()
    found: dict[int, TokenLogprobs] = {}
    for place, i in enumerate(asking):
        count = rows[i].params.top_logprobs or 0
        top = tuple(zip(tokens[place][:count], values[place][:count], strict=True))
        found[i] = TokenLogprobs(float(all_logprobs[place, token_ids[i]]), top)
    return found
