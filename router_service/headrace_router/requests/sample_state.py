"""Where a sample is on its way; `Sample.move` takes it along these edges, and no others.

QUEUED ── placed ──► PREFILLING ── Prefilled: first token ──► JOINING ── Joined ──► DECODING ──► FINISHED
   ▲                     │         first token ends it: FINISHED ◄──┤                      │
   └─────────────────────┴───── the attempt failed, another one ────┴──────────────────────┘
QUEUED ── placed, colocated ──► JOINING; PREFILLING ── Joined: the decode worker computes it itself ──► DECODING
any but QUEUED ── its decode worker goes away, and another one has a place ──► QUEUED, and placed there
any but FINISHED ── cancel, deadline, an error for the client ──► FAILED
"""

from __future__ import annotations

from enum import Enum


class SampleState(Enum):
    """See the module's docstring."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    JOINING = "joining"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"


EDGES = {
    SampleState.QUEUED: {SampleState.PREFILLING, SampleState.JOINING, SampleState.FAILED},
    SampleState.PREFILLING: {SampleState.JOINING, SampleState.DECODING, SampleState.QUEUED, SampleState.FAILED},
    SampleState.JOINING: {SampleState.DECODING, SampleState.FINISHED, SampleState.QUEUED, SampleState.FAILED},
    SampleState.DECODING: {SampleState.FINISHED, SampleState.QUEUED, SampleState.FAILED},
    SampleState.FINISHED: frozenset[SampleState](),
    SampleState.FAILED: frozenset[SampleState](),
}
