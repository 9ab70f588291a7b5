"""Whether a request's targets can still be met: who is refused as it comes, and when one is that waits. Pure.

Its first token comes after what waits before it and after its own prompt (`forecast`); the gaps between its tokens are
a decode worker's steps. What was not measured yet is taken for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headrace_router.placement.book import Book
from headrace_router.placement.capacity import WorkerView
from headrace_router.placement.forecast import shortest_step_s
from headrace_router.placement.placed import E, W


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one that came."""

    problem: str = ""
    """Why it is to be refused now; empty: it is not."""
    late_s: float = 0.0
    """By how much its first token would be too late."""
    start_by_s: float = math.inf
    """If it has not started then, its first token will be too late."""


def judge(book: Book[E, W], entry: E, workers: Sequence[WorkerView], *, due_s: float, now_s: float) -> Verdict:
    """Return what becomes of one that is not queued yet.

    Args:
        book: of the queue.
        entry: what came; its `waiting.most_step_s` is the gap that its client wants at most.
        workers: those that are there.
        due_s: when its first token is; infinite: at no time.
        now_s: the time.
    """
    waiting = entry.waiting
    if due_s == waiting.most_step_s == math.inf:
        return Verdict()
    step_s = shortest_step_s(workers)
    if step_s > waiting.most_step_s and not waiting.has_output:
        return Verdict(f"its tokens would come {step_s:.3g} s apart, and {waiting.most_step_s:.3g} s is the target")
    own_s = book.prompt_s(entry, workers)
    late_s = now_s + book.wait_s(now_s, entry) + own_s - due_s
    if late_s > 0:
        return Verdict(f"its first token would come {late_s:.3g} s too late", late_s)
    return Verdict(start_by_s=due_s - own_s)
