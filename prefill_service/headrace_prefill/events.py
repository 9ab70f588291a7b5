"""What the prefill scheduler tells of. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace_core.batch.step import Mark
from headrace_core.batch.step_book import Failed, FetchReady
from headrace_core.request import FinishReason, SampledToken


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A sequence is published: its pages hold the cache of `token_ids`.

    Computing what was not cached took as many steps as it has chunks, and `compute_s` seconds.
    """

    key: int
    token_ids: Sequence[int]
    token: SampledToken
    finish: FinishReason | None
    num_pages: int
    num_cached_tokens: int
    num_chunks: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class Admitted:
    """A sequence has its pages and is computed from its next step on; it waited for `queue_s` seconds."""

    key: int
    num_cached_tokens: int
    queue_s: float


@dataclass(frozen=True, slots=True)
class Sealed:
    """Nothing writes these layers of pages of a sequence, from `first_page` on, any more: (id, generation) of each.

    `end_layer` None: up to the last. `mark`: what a copy of them waits for, None: for all that was launched.
    """

    key: int
    first_page: int
    pages: tuple[tuple[int, int], ...]
    first_layer: int = 0
    end_layer: int | None = None
    mark: Mark | None = None


PrefillEvent = FetchReady | Admitted | Sealed | Prefilled | Failed
