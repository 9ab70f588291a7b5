"""What a worker's metrics say of its experts and its ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace_core.errors import NotFoundError

from headrace_client.top.samples import Samples

PARTS = ("compute", "communication", "waiting")
_MOST_NUMBER = 1_000_000
"""Of a layer, expert or rank; a page that says more is none of ours."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Of one worker. Of one that is no group of ranks with whole experts, what is of ranks is empty.

    `tokens`: by layer, of each expert, since the worker began. `rank_tokens`: by layer, of each rank, of late, where
    experts are now. `parts`: seconds of each rank in steps, by `PARTS`. `num_slots`: of a layer.
    """

    worker: str
    tokens: Mapping[int, tuple[float, ...]]
    num_ranks: int = 1
    rank_tokens: Mapping[int, tuple[float, ...]] | None = None
    parts: tuple[tuple[float, ...], ...] = ()
    num_slots: int = 0
    step_s: float | None = None
    rebalances: Mapping[str, float] | None = None
    moved_experts: float = 0.0
    moved_bytes: float = 0.0


def counted(samples: Samples, worker: str) -> Counted:
    """Read it.

    Raises:
        NotFoundError: NO_EXPERTS, no expert has had a token.
    """
    tokens = _by_number(samples, "headrace_expert_tokens_total", key="layer", of="expert")
    tokens = {layer: of_experts for layer, of_experts in tokens.items() if sum(of_experts)}
    if not tokens:
        problem = "no token was routed to an expert yet, or its model has none"
        raise NotFoundError("NO_EXPERTS", f"{worker}: {problem}; ask it for some tokens first")
    by_rank = samples.labelled("headrace_rank_seconds_total", key="rank", of="part")
    steps, seconds = samples.total("headrace_step_seconds_count"), samples.total("headrace_step_seconds_sum")
    rank_tokens = _by_number(samples, "headrace_expert_rank_tokens", key="layer", of="rank")
    return Counted(
        worker,
        tokens,
        max(1, int(samples.total("headrace_ranks"))),
        {layer: of_ranks for layer, of_ranks in rank_tokens.items() if sum(of_ranks)},
        tuple(tuple(by_rank[rank].get(part, 0.0) for part in PARTS) for rank in sorted(by_rank, key=int)),
        int(samples.total("headrace_expert_slots")),
        seconds / steps if steps else None,
        samples.by("headrace_rebalances_total", "outcome"),
        samples.total("headrace_moved_experts_total"),
        samples.total("headrace_moved_expert_bytes_total"),
    )


def _by_number(samples: Samples, name: str, *, key: str, of: str) -> dict[int, tuple[float, ...]]:
    """Return a metric's values by two labels that are numbers from 0 on."""
    found: dict[int, tuple[float, ...]] = {}
    for label, values in samples.labelled(name, key=key, of=of).items():
        numbers = {int(number): value for number, value in values.items() if number.isascii() and number.isdigit()}
        if numbers and label.isascii() and label.isdigit() and max(numbers) < _MOST_NUMBER:
            found[int(label)] = tuple(numbers.get(number, 0.0) for number in range(max(numbers) + 1))
    return dict(sorted(found.items()))
