"""What is simulated: workers, the wire between them, what fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from headrace_core.errors import InvalidRequestError

from headrace_planner.step_times import StepTimes

Fidelity = Literal["exact", "fast", "auto"]


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One kind of worker: its settings, as in `headrace_core.config`, and its speed."""

    times: StepTimes
    num_pages: int = 65536
    page_size: int = 64
    max_step_tokens: int = 8192
    max_step_sequences: int = 256
    num_gpus: int = 1
    groups: int = 1
    """Lanes, the data-parallel groups of attention: a prompt is in one of them, which has a part of the pages."""


@dataclass(frozen=True, slots=True)
class Wire:
    """What moving costs. Seconds, bytes."""

    bytes_per_token: float = 70272.0
    bandwidth: float = 50e9
    """Bytes per second of one worker's link; transfers of one link wait for each other."""
    latency_s: float = 20e-6
    """Of one hand-off, on top of its bytes."""
    latency_per_token_s: float = 0.0
    """Work of a hand-off that does not wait for the link: checksums on a thread."""
    overlap: float = 0.0
    """Share of the bytes that moved while the prompt was still being computed."""
    admit_s: float = 0.0
    """From the client to the router's queue: one call and the tokenizer."""
    rpc_s: float = 0.0
    """One call between router and worker, or a token's way to the client."""
    crowding: float = 0.0
    """How much longer calls and hand-offs take, as a share, for each sequence that is in a step meanwhile: they wait
    for cores that workers compute on, and for loops that send others' tokens. Exact fidelity only; 0: not at all."""


@dataclass(frozen=True, slots=True)
class Outage:
    """One worker ends at `at_s`, with everything it holds, and is back, empty, after `repair_s`."""

    at_s: float
    worker: int
    """Prefill workers come first, then decode workers, then colocated ones."""
    repair_s: float = 60.0


@dataclass(frozen=True, slots=True)
class SimConfig:
    """A cluster. Either prefill and decode workers, or colocated ones (`both`), or all three kinds."""

    prefill: WorkerSpec | None = None
    decode: WorkerSpec | None = None
    both: WorkerSpec | None = None
    num_prefill: int = 0
    num_decode: int = 0
    num_both: int = 0
    wire: Wire = field(default_factory=Wire)
    fidelity: Fidelity = "auto"
    outages: Sequence[Outage] = ()
    detect_s: float = 1.0
    """From a worker's end to the router's knowing."""
    interference: tuple[float, float] = (1.0, 1.0)
    """How much slower a step of (prefill, decode) is while a worker of the other kind computes: workers that share a
    machine's cores and memory. Exact fidelity only; 1: they share nothing."""
    placement: str = "affinity"
    """Which prefill worker gets a prompt: one of `headrace_router.placement.preferences`."""
    predicts_local: bool = False
    """Let decode workers compute prompts that are cheaper there (`placement.local_prefill`). Exact fidelity only."""
    ttft_target_s: float = math.inf
    """Requests whose first token can't come so soon after them are refused (`placement.early_rejection`)."""
    itl_target_s: float = math.inf
    """Who has it prefers decode workers with steps so short, and is refused where none has. Exact fidelity only."""
    shortlist: int = 4
    """Fast fidelity: workers of a kind that placement chooses among; see `sim_router`."""

    def __post_init__(self) -> None:
        """Check that it can serve.

        Raises:
            InvalidRequestError: BAD_CLUSTER.
        """
        pairs = self.num_prefill > 0 and self.num_decode + self.num_both > 0
        if not (pairs or self.num_both):
            text = (
                f"{self.num_prefill} prefill, {self.num_decode} decode, {self.num_both} colocated workers can't serve"
            )
            raise InvalidRequestError("BAD_CLUSTER", text)

    @property
    def num_workers(self) -> int:
        """All of them."""
        return self.num_prefill + self.num_decode + self.num_both

    @property
    def num_gpus(self) -> int:
        """All of them."""
        kinds = ((self.prefill, self.num_prefill), (self.decode, self.num_decode), (self.both, self.num_both))
        return sum(spec.num_gpus * count for spec, count in kinds if spec is not None)


def random_outages(
    num_workers: int, *, mtbf_s: float, repair_s: float, until_s: float, seed: int = 0
) -> tuple[Outage, ...]:
    """Return outages whose gaps are exponential, `mtbf_s` apart for each worker on average."""
    random = np.random.default_rng(seed)
    outages: list[Outage] = []
    for worker in range(num_workers):
        at_s = float(random.exponential(mtbf_s))
        while at_s < until_s:
            outages.append(Outage(at_s, worker, repair_s))
            at_s += repair_s + float(random.exponential(mtbf_s))
    return tuple(sorted(outages, key=lambda outage: (outage.at_s, outage.worker)))
