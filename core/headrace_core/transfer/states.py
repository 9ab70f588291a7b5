"""The two state machines of a hand-off, as tables: (state, event) -> state; what is not in a table can not happen.

The holder's lease (`lease.py`) and the taker's side (`taker.py`) move by them and by nothing else, and so does the
model in tests/model, which visits every state that two attempts at a sequence can be in together.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class LeaseState(Enum):
    """Where a lease is; `lease.py` draws it."""

    QUEUED = "queued"
    OPEN = "open"
    SEALED = "sealed"
    TAKEN = "taken"
    ABORTED = "aborted"
    FREED = "freed"


class LeaseEvent(Enum):
    """What happens to a lease."""

    ADMIT = "admit"
    """Its sequence has pages."""
    SEAL = "seal"
    """Nothing writes some of them any more."""
    COMPLETE = "complete"
    """Everything is computed."""
    TAKE = "take"
    """It fulfilled its purpose: its taker confirmed, or the first token ends the sequence."""
    ABORT = "abort"
    """The call ended, the sequence failed, a higher attempt came."""
    FREE = "free"
    """Its pages are given back."""


LEASE_MOVES: Mapping[tuple[LeaseState, LeaseEvent], LeaseState] = {
    (LeaseState.QUEUED, LeaseEvent.ADMIT): LeaseState.OPEN,
    (LeaseState.QUEUED, LeaseEvent.ABORT): LeaseState.ABORTED,
    (LeaseState.OPEN, LeaseEvent.SEAL): LeaseState.OPEN,
    (LeaseState.OPEN, LeaseEvent.COMPLETE): LeaseState.SEALED,
    (LeaseState.OPEN, LeaseEvent.ABORT): LeaseState.ABORTED,
    (LeaseState.SEALED, LeaseEvent.SEAL): LeaseState.SEALED,
    (LeaseState.SEALED, LeaseEvent.TAKE): LeaseState.TAKEN,
    (LeaseState.SEALED, LeaseEvent.ABORT): LeaseState.ABORTED,
    (LeaseState.TAKEN, LeaseEvent.FREE): LeaseState.FREED,
    (LeaseState.ABORTED, LeaseEvent.FREE): LeaseState.FREED,
}


class TakeState(Enum):
    """Where the taking of a sequence is; `taker.py` draws it."""

    OPENED = "opened"
    PULLING = "pulling"
    FINISHING = "finishing"
    CONFIRMING = "confirming"
    TAKEN = "taken"
    FAILED = "failed"
    DRAINED = "drained"


class TakeEvent(Enum):
    """What happens to it."""

    ADMITTED = "admitted"
    HELD = "the admission of a prefix"
    """Nothing of it is to be computed."""
    RUN = "a run"
    LAST = "the first token"
    END = "a first token that is the last"
    VERIFIED = "every page is here and verified"
    CONFIRMED = "confirmed"
    FAIL = "a failure"
    """Refused, lost, corrupt, cancelled."""
    DRAINED = "no byte can land any more"


TAKE_MOVES: Mapping[tuple[TakeState, TakeEvent], TakeState] = {
    (TakeState.OPENED, TakeEvent.ADMITTED): TakeState.PULLING,
    (TakeState.OPENED, TakeEvent.HELD): TakeState.FINISHING,
    (TakeState.OPENED, TakeEvent.FAIL): TakeState.FAILED,
    (TakeState.PULLING, TakeEvent.RUN): TakeState.PULLING,
    (TakeState.PULLING, TakeEvent.LAST): TakeState.FINISHING,
    (TakeState.PULLING, TakeEvent.END): TakeState.TAKEN,
    (TakeState.PULLING, TakeEvent.FAIL): TakeState.FAILED,
    (TakeState.FINISHING, TakeEvent.RUN): TakeState.FINISHING,
    (TakeState.FINISHING, TakeEvent.VERIFIED): TakeState.CONFIRMING,
    (TakeState.FINISHING, TakeEvent.FAIL): TakeState.FAILED,
    (TakeState.CONFIRMING, TakeEvent.CONFIRMED): TakeState.TAKEN,
    (TakeState.CONFIRMING, TakeEvent.FAIL): TakeState.FAILED,
    (TakeState.TAKEN, TakeEvent.DRAINED): TakeState.DRAINED,
    (TakeState.FAILED, TakeEvent.DRAINED): TakeState.DRAINED,
}
