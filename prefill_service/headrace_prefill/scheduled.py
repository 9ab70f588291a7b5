"""A sequence as the prefill scheduler sees it. Pure; engine thread only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from headrace_core.batch.spec import SequenceSpec
from headrace_core.kv.sequence_pages import SequencePages


class State(Enum):
    """Where a sequence is; see the scheduler."""

    WAITING = "waiting"
    FETCHING = "fetching"
    RUNNING = "running"
    PUBLISHED = "published"
    QUARANTINED = "quarantined"


@dataclass(slots=True)
class Scheduled:
    """What the scheduler knows of it."""

    key: int
    group: int
    spec: SequenceSpec
    added_s: float
    num_cached_elsewhere: int = 0
    """Pages."""
    state: State = State.WAITING
    pages: SequencePages | None = None
    num_computed: int = 0
    num_cached: int = 0
    num_sealed: int = 0
    """Pages, in all layers; those counted that the taker has."""
    num_sealed_layers: int = 0
    """Layers of the planned chunk's pages that are sealed already."""
    is_lost: bool = False
    """True when sealed pages were written again."""
    started_s: float = 0.0
    num_chunks: int = 0

    @property
    def num_tokens(self) -> int:
        """Of the prompt."""
        return len(self.spec.token_ids)

    @property
    def num_left(self) -> int:
        """Tokens to compute."""
        return self.num_tokens - self.num_computed
