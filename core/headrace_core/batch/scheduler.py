"""What a scheduler is asked, and what it says of its load: the same for prefill and decode. No torch, no grpc."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from headrace_core.batch.step import StepPlan, StepResult
from headrace_core.kv.page_pool import PageState

E_co = TypeVar("E_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Load:
    """What the scheduler holds now."""

    num_free_pages: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_sequences: int = 0
    page_counts: dict[PageState, int] = field(default_factory=dict[PageState, int])
    cache_changes: Sequence[tuple[int, bool]] = ()
    """What the prefix cache got (True) and lost since the last look, by pages' hashes; in one `Load` alone."""
    most_free_pages: int = 0
    """Of `num_free_pages` those that one sequence could have: the lane's that has most."""


class Scheduler(Protocol[E_co]):
    """What the engine asks of a scheduler. Engine thread only; `now` is the engine's clock, seconds."""

    def plan(self, now: float) -> StepPlan | None:
        """Choose the next step's work; None when nothing can be computed until a command comes."""
        ...

    def apply(self, result: StepResult, now: float) -> None:
        """Take in what the planned step produced; end the sequences that failed in it and free their pages."""
        ...

    def take_events(self) -> Sequence[E_co]:
        """Return what happened since the last call, in order; commands, plans and steps all make events."""
        ...

    def running_keys(self) -> Collection[int]:
        """Return the keys of the sequences that may have rows; asked with a plan, before it is applied."""
        ...

    def load(self) -> Load:
        """Return what is held now."""
        ...
