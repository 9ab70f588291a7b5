"""What a request asks to be changed in its logits: penalties, bias, and what `min_tokens` or a grammar forbids.

Made once for a sequence, as tensors on the device of the logits; a step adds the tokens that are new. So a step's work
is bounded by the vocabulary and by what validation lets a request name, never by the length of prompt and output.

Letter: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headrace_core.batch.step import SamplingRow
from headrace_core.grammar import Grammars, GrammarState
from headrace_core.model.host_copies import to_device
from headrace_core.request import SamplingParams


def needs_changes(row: SamplingRow) -> bool:
    """True if the row's logits are not taken as they are."""
    params = row.params
    is_early = len(row.output_token_ids) < params.min_tokens
    return bool(_has_penalties(params) or params.logit_bias or is_early or params.grammar)


def banned_tokens(row: SamplingRow) -> set[int]:
    """Return the tokens that `min_tokens` forbids to be next."""
    is_early = len(row.output_token_ids) < row.params.min_tokens
    return {*row.eos_token_ids, *row.params.stop_token_ids} if is_early else set()


def change_logits(logits: Tensor, row: SamplingRow, grammars: Grammars | None = None) -> None:
    """Apply the row's penalties, bias and bans, in this order, to its `logits` [V] float32, in place.

    Waits for nothing: no number is assigned to a part of a tensor, which would copy it to the device and wait.

    Keeps what it prepares in the row's memo. A forbidden token's logit is -inf. Others may overflow to infinity where
    the model's are as large as float32 goes.

    Raises:
        InvalidRequestError: BAD_GRAMMAR, the row can't be held to its grammar; its logits may be changed in part.

    Source: transformers RepetitionPenaltyLogitsProcessor; OpenAI API reference, "frequency and presence penalties".
    """
    kept = row.memo.kept
    changes = kept if isinstance(kept, _Changes) else _Changes(row, len(logits), logits.device, grammars)
    row.memo.kept = changes
    changes.apply(logits, row)


class _Changes:
    """One sequence's."""

    def __init__(self, row: SamplingRow, vocab_size: int, device: torch.device, grammars: Grammars | None) -> None:
        params = row.params
        self._seen = _SeenTokens(row, vocab_size, device) if _has_penalties(params) else None
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            tokens = torch.tensor(list(params.logit_bias))
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            self._bias = to_device(tokens, device), to_device(values, device)
        self._grammar: GrammarState | None = None
        if params.grammar is not None:
            assert grammars is not None, "its worker took it"
            self._grammar = grammars.state(params.grammar)
        self._banned: Tensor | None = None
        banned = banned_tokens(row)
        if banned:
            self._banned = to_device(torch.tensor(list(banned)), device)

    def apply(self, logits: Tensor, row: SamplingRow) -> None:
        if self._seen is not None:
            self._seen.catch_up(row.output_token_ids)
            self._seen.penalise(logits, row.params)
        if self._bias is not None:
            tokens, values = self._bias
            logits[tokens] += values
        if self._banned is not None and len(row.output_token_ids) < row.params.min_tokens:
            logits.index_fill_(0, self._banned, float("-inf"))
        if self._grammar is not None:
            allowed = torch.from_numpy(self._grammar.mask(row.output_token_ids))
            logits.masked_fill_(to_device(~allowed, logits.device), float("-inf"))


class _SeenTokens:
    """Which tokens penalties are about, [V] bool, and how often each is in the output, [V] float32.

    Over the whole vocabulary, because to find the different tokens of a prompt of 160,000 takes far longer than a step.
    """

    def __init__(self, row: SamplingRow, vocab_size: int, device: torch.device) -> None:
        self._num_output = len(row.output_token_ids)
        counts = np.bincount(np.array(row.output_token_ids, dtype=np.int64), minlength=vocab_size)
        is_seen = counts > 0
        if row.params.repetition_penalty != 1.0:  # the other penalties are about the output alone
            is_seen[np.array(row.prompt_token_ids, dtype=np.int64)] = True
        self._is_seen = to_device(torch.from_numpy(is_seen), device)
        self._counts = to_device(torch.from_numpy(counts.astype(np.float32)), device)

    def catch_up(self, output_token_ids: Sequence[int]) -> None:
        """Take in what was added to the output since the last call, at most a few tokens."""
        for token_id in output_token_ids[self._num_output :]:
            self._is_seen[token_id].fill_(True)
            self._counts[token_id].add_(1)
        self._num_output = len(output_token_ids)

    def penalise(self, logits: Tensor, params: SamplingParams) -> None:
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self._is_seen, penalised, logits))
        if params.presence_penalty or params.frequency_penalty:
            penalties = params.presence_penalty + params.frequency_penalty * self._counts
            logits -= penalties.masked_fill_(self._counts == 0, 0.0)


def _has_penalties(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)
