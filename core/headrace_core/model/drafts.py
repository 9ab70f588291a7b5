"""Draw the tokens of a step with drafts: position by position, for as long as the draft says what is drawn.

The sampler's draw depends on (seed, sample index, position) and on the logits alone, so all positions of a sequence are
asked for at once, and what was drawn behind a wrong guess is dropped. A sequence whose logits are changed by what came
before (penalties, least lengths, a grammar) is asked for position by position, each when every token before it was
drawn. So the sampler is told what plain decoding would tell it, and what it keeps of a sequence never saw a token that
was not drawn: a draft decides how many tokens a step gives, never which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from headrace_core.batch.step import Chunk, SamplingRow
from headrace_core.errors import HeadraceError
from headrace_core.grammar import Grammars
from headrace_core.model.host_copies import to_device
from headrace_core.model.logit_changes import needs_changes
from headrace_core.model.sampler import sample
from headrace_core.request import SampledToken


def sample_chunks(
    logits: Tensor, chunks: Sequence[Chunk], rows: Sequence[SamplingRow], grammars: Grammars | None = None
) -> list[list[SampledToken] | HeadraceError]:
    """Return the tokens that follow each chunk, one at least, or why it has none; see `sampler.sample`.

    What can't be drawn behind a token that was is not told: the next step finds it out.

    Args:
        logits: [L, V] float32, a row for each chunk, and for one with a draft a row for each of its tokens.
        chunks: those that are sampled, in order.
        rows: what each chunk's first new token depends on.
        grammars: the model's; None: no row has one.

    Raises:
        ValueError: the number of rows differs.
    """
    if not any(chunk.num_draft for chunk in chunks):
        return [[found] if isinstance(found, SampledToken) else found for found in sample(logits, rows, grammars)]
    try:
        return _drawn(logits, chunks, rows, grammars)
    except Exception:
        forget_draws(rows)
        raise


def forget_draws(rows: Iterable[SamplingRow]) -> None:
    """Let a step be run again: what was taken in of it already would be so twice."""
    for row in rows:
        row.memo.kept = None


def _drawn(
    logits: Tensor, chunks: Sequence[Chunk], rows: Sequence[SamplingRow], grammars: Grammars | None
) -> list[list[SampledToken] | HeadraceError]:
    first = 0
    all_draws: list[_Draws] = []
    for chunk, row in zip(chunks, rows, strict=True):
        all_draws.append(_Draws(first, chunk, row))
        first += 1 + chunk.num_draft
    if first != len(logits):
        raise ValueError(f"logits {tuple(logits.shape)} do not fit {first} tokens")
    going = all_draws
    while going:
        asked = [draws.asked() for draws in going]
        places = [draws.at + i for draws, some in zip(going, asked, strict=True) for i in range(len(some))]
        is_all = len(places) == len(logits)  # in their order
        chosen = logits if is_all else logits.index_select(0, to_device(torch.tensor(places), logits.device))
        found = iter(sample(chosen, [row for some in asked for row in some], grammars))
        going = [d for d, some in zip(going, asked, strict=True) if d.take(list(islice(found, len(some))))]
    return [draws.tokens or draws.error for draws in all_draws]


class _Draws:
    """One chunk's: `at` is the next one's row of the logits, `_row` what it depends on."""

    def __init__(self, at: int, chunk: Chunk, row: SamplingRow) -> None:
        self.at, self._row = at, row
        self.tokens: list[SampledToken] = []
        self.error = HeadraceError("BUG", "internal error")
        self._draft = chunk.token_ids[1:] if chunk.num_draft else []

    def asked(self) -> list[SamplingRow]:
        """Return the rows to draw now: of all its positions, or of the next one."""
        if needs_changes(self._row):
            return [self._row]
        num_more = len(self._draft) - len(self.tokens)
        return [self._row, *(replace(self._row, position=self._row.position + 1 + i) for i in range(num_more))]

    def take(self, outcomes: list[SampledToken | HeadraceError]) -> bool:
        """Take what was drawn, as far as the draft was right; return whether it goes on from there."""
        return all(self._take(outcome) for outcome in outcomes)

    def _take(self, outcome: SampledToken | HeadraceError) -> bool:
        if isinstance(outcome, HeadraceError):
            self.error = outcome
            return False
        output = self._row.output_token_ids
        if not self.tokens:
            output = list(output)  # the sequence's own grow when the step is applied
        self.tokens.append(outcome)
        count = len(self.tokens)
        if count > len(self._draft) or outcome.token_id != self._draft[count - 1]:
            return False
        output.append(outcome.token_id)
        self.at += 1
        self._row = replace(self._row, output_token_ids=output, position=self._row.position + 1)
        return True
