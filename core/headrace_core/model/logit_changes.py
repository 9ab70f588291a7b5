"""What a request asks to be changed in its logits: penalties, bias, and the tokens that `min_tokens` forbids.

Made once for a sequence, as tensors on the device of the logits; a step adds the tokens that are new and changes the
logits of the tokens concerned. So a step's work is bounded by the vocabulary and by what validation lets a request
name, never by the length of prompt and output.

Letters: V vocabulary, U different tokens of a sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from headrace_core.batch.step import SamplingRow
from headrace_core.model.host_copies import to_device
from headrace_core.request import SamplingParams


def needs_changes(row: SamplingRow) -> bool:
    """True if the row's logits are not taken as they are."""
    params = row.params
    return bool(_has_penalties(params) or params.logit_bias or len(row.output_token_ids) < params.min_tokens)


def change_logits(logits: Tensor, row: SamplingRow) -> None:
    """Apply the row's penalties, bias and bans, in this order, to its `logits` [V] float32, in place.

    Waits for nothing: no number is assigned to a part of a tensor, which would copy it to the device and wait.

    Keeps what it prepares in the row's memo. A forbidden token's logit is -inf. Others may overflow to infinity where
    the model's are as large as float32 goes.

    Source: transformers RepetitionPenaltyLogitsProcessor; OpenAI API reference, "frequency and presence penalties".
    """
    kept = row.memo.kept
    changes = kept if isinstance(kept, _Changes) else _Changes(row, logits.device)
    row.memo.kept = changes
    changes.apply(logits, row)


class _Changes:
    """One sequence's."""

    def __init__(self, row: SamplingRow, device: torch.device) -> None:
        params = row.params
        self._seen = _SeenTokens(row, device) if _has_penalties(params) else None
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            tokens = torch.tensor(list(params.logit_bias))
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            self._bias = to_device(tokens, device), to_device(values, device)
        self._banned: Tensor | None = None
        banned = {*row.eos_token_ids, *params.stop_token_ids}
        if banned and len(row.output_token_ids) < params.min_tokens:
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


class _SeenTokens:
    """The different tokens that penalties are about, and how often each is in the output; grows by the output's."""

    def __init__(self, row: SamplingRow, device: torch.device) -> None:
        counts = Counter(row.output_token_ids)
        if row.params.repetition_penalty != 1.0:
            tokens = list(dict.fromkeys(row.prompt_token_ids) | counts)
        else:
            tokens = list(counts)  # the other penalties are about the output alone
        self._places = {token_id: place for place, token_id in enumerate(tokens)}
        self._num_output = len(row.output_token_ids)
        padding = [0] * (_room(len(tokens)) - len(tokens))
        repeats = [counts[token] for token in tokens]
        self._tokens = to_device(torch.tensor(tokens + padding), device)
        self._counts = to_device(torch.tensor(repeats + padding, dtype=torch.float32), device)

    def catch_up(self, output_token_ids: Sequence[int]) -> None:
        """Take in what was added to the output since the last call, at most a few tokens."""
        for index in range(self._num_output, len(output_token_ids)):
            place = self._places.setdefault(output_token_ids[index], len(self._places))
            if place == len(self._tokens):
                self._tokens, self._counts = _grown(self._tokens), _grown(self._counts)
            self._tokens[place].fill_(output_token_ids[index])
            self._counts[place].add_(1)
            self._num_output = index + 1

    def penalise(self, logits: Tensor, params: SamplingParams) -> None:
        tokens, counts = self._tokens[: len(self._places)], self._counts[: len(self._places)]
        values = logits[tokens]
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            values = torch.where(values > 0, values / penalty, values * penalty)
        if params.presence_penalty or params.frequency_penalty:
            values -= (params.presence_penalty + params.frequency_penalty * counts).masked_fill_(counts == 0, 0.0)
        logits[tokens] = values


def _has_penalties(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)


def _room(num_tokens: int) -> int:
    return num_tokens + num_tokens // 2 + 64


def _grown(values: Tensor) -> Tensor:
    """Return `values` with zeros behind them."""
    grown = values.new_zeros(_room(len(values)))
    grown[: len(values)] = values
    return grown
