"""What a step says of prompts besides the tokens that follow them: log-probabilities in the places of their tokens.

A few rows at a time have their logits made and are done with: those of a long chunk would take gigabytes. In a group
every rank makes its columns of its lane's rows, and rank 0 learns all of them, in an order that all ranks know.

Letters: T tokens of a step, R rows of logits, N hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from headrace_core.batch.step import Chunk, Scoring
from headrace_core.errors import HeadraceError
from headrace_core.model.group_results import bad_logits, gather_logits
from headrace_core.model.host_copies import to_device, to_host
from headrace_core.model.logprobs import logprobs_of
from headrace_core.model.op_timer import OpTimer
from headrace_core.ranks.group import Ranks
from headrace_core.request import PromptLogprobs

MOST_LOGITS = 1 << 22
"""Values of logits that there are at once; with what ranks them about 100 MB."""


class PromptScores:
    """`keep` the rows of a step, `score` them, `take` what came of that. Engine thread only."""

    def __init__(
        self, head: Callable[[Tensor, OpTimer], Tensor], vocab_size: int, ranks: Ranks, no_logits: Tensor
    ) -> None:
        """Take what it is computed by.

        Args:
            head: makes logits [R, this rank's columns] float32 of rows [R, N].
            vocab_size: V.
            ranks: where this rank stands.
            no_logits: [0, this rank's columns] float32.
        """
        self._head = head
        self._vocab_size = vocab_size
        self._ranks = ranks
        self._no_logits = no_logits
        self._rows: dict[int, Tensor] = {}
        self._said: dict[int, PromptLogprobs] = {}

    def forget(self) -> None:
        """Have nothing: a step begins."""
        self._rows, self._said = {}, {}

    def keep(self, hidden: Tensor, chunk_rows: Sequence[int], chunks: Sequence[Chunk]) -> None:
        """Keep those rows of this lane's `hidden` [T, N] that say something of a prompt."""
        for row, chunk in zip(chunk_rows, chunks, strict=True):
            if chunk.scoring is not None:
                first = row + chunk.scoring.first_row
                self._rows[chunk.key] = hidden[first : first + len(chunk.scoring.token_ids)]

    def score(self, chunks: Sequence[Chunk], timer: OpTimer) -> dict[int, HeadraceError]:
        """Have on rank 0 what the rows say; return, by key, why nothing can be said of some prompts.

        Args:
            chunks: all lanes', in the plan's order; all ranks call this for the same ones.
            timer: is told of the head.
        """
        failed: dict[int, HeadraceError] = {}
        for chunk in chunks:
            if chunk.scoring is None:
                continue
            parts = list(self._parts(chunk, chunk.scoring, timer))
            if not parts:
                continue
            best, ranked, logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
            if bool(logprobs.isfinite().all()):
                self._said[chunk.key] = _columns(chunk.start + chunk.scoring.first_row + 1, best, ranked, logprobs)
            else:
                failed[chunk.key] = bad_logits(chunk)
        self._rows = {}
        return failed

    def take(self) -> dict[int, PromptLogprobs]:
        """Return what the last step said of prompts, by key."""
        said, self._said = self._said, {}
        return said

    def _parts(self, chunk: Chunk, scoring: Scoring, timer: OpTimer) -> Iterator[list[Tensor]]:
        """Yield `_places` of a few rows after the others; nothing but on rank 0."""
        most, rows, ranks = max(1, MOST_LOGITS // self._vocab_size), self._rows.get(chunk.key), self._ranks
        for start in range(0, len(scoring.token_ids), most):
            token_ids = scoring.token_ids[start : start + most]
            logits = self._no_logits if rows is None else self._head(rows[start : start + most], timer)
            if ranks.layout.size > 1:
                logits = gather_logits(logits, [chunk.lane] * len(token_ids), self._vocab_size, ranks)
            if len(logits):
                yield _places(logits, token_ids, scoring.num_top)


def _places(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[Tensor]:
    """Return the most probable tokens [R, n] int64, the ranks of `token_ids` [R] int64, log-probabilities [R, 1 + n].

    On the host.
    """
    own = to_device(torch.tensor(token_ids), logits.device)
    ranked = (logits > logits.gather(1, own[:, None])).sum(dim=-1) + 1
    best, logprobs = logprobs_of(logits, own, num_top)
    return to_host([best, ranked, logprobs])


def _columns(first: int, best: Tensor, ranked: Tensor, logprobs: Tensor) -> PromptLogprobs:
    return PromptLogprobs(
        first,
        logprobs[:, 0].tolist(),
        ranked.tolist(),
        best.shape[1],
        best.flatten().tolist(),
        logprobs[:, 1:].flatten().tolist(),
    )
