"""Choose the next token of each sequence of a step, or say why it has none.

In order: penalties, logit bias, what `min_tokens` or a grammar forbids, temperature, top-k, top-p, min-p, one draw.
The draw depends on (seed, sample index, position) and on the row's own logits; on nothing else in the batch and on no
hidden state, so that any worker continues a sequence as any other would have.

A token is in the vocabulary and its logit was finite after all that changed it: never a forbidden one. Where that
leaves nothing, or the model's own logits are not all finite, the row has an error in its place, and the others theirs.

On a GPU the host prepares and launches all of this while the step computes; then it waits once, for one copy that holds
whatever the answers need.

Letters: L rows, V vocabulary, A rows that ask for log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from headrace_kernels.draws import Draws
from headrace_kernels.sampling import sample_tokens
from torch import Tensor

from headrace_core.batch.step import SamplingRow
from headrace_core.errors import HeadraceError, InvalidRequestError
from headrace_core.grammar import Grammars
from headrace_core.model.host_copies import to_device, to_host
from headrace_core.model.logit_changes import banned_tokens, change_logits, needs_changes
from headrace_core.model.logprobs import logprobs_of
from headrace_core.request import SampledToken, TokenLogprobs

_NOT_FINITE = -2
"""Besides `NO_TOKEN`: the model's own logits are not finite."""


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], grammars: Grammars | None = None
) -> list[SampledToken | HeadraceError]:
    """Return each row's next token, or why it has none.

    The error is BAD_LOGITS if the row's logits are not all finite, as they come or after penalties and bias; an
    InvalidRequestError BAD_SAMPLING if every token is forbidden, BAD_GRAMMAR if the row can't be held to its grammar.

    Args:
        logits: [L, V] float32, the model's own; not changed.
        rows: what each row's choice depends on; what their memos keep is brought up to date.
        grammars: the model's; None: no row has one.

    Raises:
        ValueError: the number of rows differs.
    """
    if len(logits) != len(rows):
        raise ValueError(f"logits {tuple(logits.shape)} do not fit {len(rows)} rows")
    if not rows:
        return []
    # A NaN wins both comparisons. Times 0 it stays one, an infinity becomes one, and neither equals anything.
    # Apart: on a CPU aminmax takes ten times as long as both.
    lowest, highest = logits.amin(dim=-1), logits.amax(dim=-1)
    is_bad = lowest * 0 != highest * 0
    failed: dict[int, HeadraceError] = {}
    changed = _changed(logits, rows, grammars, failed)
    tokens = sample_tokens(changed, _draws(rows, logits.device)).masked_fill_(is_bad, _NOT_FINITE)
    asking = [i for i, row in enumerate(rows) if row.params.top_logprobs is not None]
    token_ids, *found = to_host([tokens, *_logprobs(logits, tokens, rows, asking)])
    logprobs = _by_row(found, rows, asking)
    return [
        SampledToken(token_id, logprobs.get(i))
        if i not in failed and 0 <= token_id < logits.shape[1]
        else failed.get(i) or _error(token_id, row, logits.shape[1])
        for i, (token_id, row) in enumerate(zip(token_ids.tolist(), rows, strict=True))
    ]


def _changed(
    logits: Tensor, rows: Sequence[SamplingRow], grammars: Grammars | None, failed: dict[int, HeadraceError]
) -> Tensor:
    """Return logits with what the rows ask to be changed in theirs; the input itself if none asks for anything.

    Puts into `failed` why a row's can't be.
    """
    touched = [i for i, row in enumerate(rows) if needs_changes(row)]
    if not touched:
        return logits
    logits = logits.clone()
    for i in touched:
        try:
            change_logits(logits[i], rows[i], grammars)
        except InvalidRequestError as error:
            failed[i] = error
    return logits


def _error(token_id: int, row: SamplingRow, vocab_size: int) -> HeadraceError:
    """Return why the row has no token: `token_id` is _NOT_FINITE, or NO_TOKEN after its logits were changed."""
    if token_id != _NOT_FINITE and len(banned_tokens(row)) >= vocab_size:
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
    floats = [
        [0.0 if p.is_greedy else p.temperature for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
    ]
    integers = [
        [p.top_k for p in params],
        [_signed(p.seed or 0) for p in params],
        [row.sample_index for row in rows],
        [row.position for row in rows],
    ]
    # One copy. Each column begins at a multiple of 16 bytes, like memory of its own: kernels are compiled for that.
    packed = np.zeros((len(floats) + len(integers), len(rows) + len(rows) % 2), dtype=np.int64)
    packed.view(np.float64)[: len(floats), : len(rows)] = floats
    packed[len(floats) :, : len(rows)] = integers
    columns = to_device(torch.from_numpy(packed), device)[:, : len(rows)]
    temperatures, top_p, min_p = columns[: len(floats)].view(torch.float64)
    top_k, seeds, sample_indices, positions = columns[len(floats) :]
    return Draws(temperatures, top_k, top_p, min_p, seeds, sample_indices, positions)


def _signed(seed: int) -> int:
    """Return the signed integer that has the 64 bits of `seed`."""
    return seed - (1 << 64) if seed >> 63 else seed


def _logprobs(logits: Tensor, tokens: Tensor, rows: Sequence[SamplingRow], asking: Sequence[int]) -> list[Tensor]:
    """Return the most probable tokens of the rows that ask, [A, n] int64, and log-probabilities, [A, 1 + n] float32.

    The first of these is that of the row's own of `tokens` [L], the others are the most probable ones'; n is as many as
    any row asks for. A row that has no token gets numbers that mean nothing. Empty if no row asks.
    """
    if not asking:
        return []
    places = to_device(torch.tensor(asking), logits.device)
    logits = logits.index_select(0, places)
    most = max(rows[i].params.top_logprobs or 0 for i in asking)
    own = tokens.index_select(0, places).clamp_(0, logits.shape[1] - 1)
    return list(logprobs_of(logits, own, most))


def _by_row(found: Sequence[Tensor], rows: Sequence[SamplingRow], asking: Sequence[int]) -> dict[int, TokenLogprobs]:
    """Return what `_logprobs` found, on the host, by row."""
    if not asking:
        return {}
    best, logprobs = found
    by_row: dict[int, TokenLogprobs] = {}
    for i, tokens, (own, *values) in zip(asking, best.tolist(), logprobs.tolist(), strict=True):
        count = rows[i].params.top_logprobs or 0
        by_row[i] = TokenLogprobs(own, tuple(zip(tokens[:count], values[:count], strict=True)))
    return by_row
