"""Every error that can cross a process boundary, the gRPC status each becomes, what the router does.

    HeadraceError                INTERNAL             fail the request, log, count
    ├── InvalidRequestError      INVALID_ARGUMENT     return to the client
    ├── NotFoundError            NOT_FOUND            return to the client
    ├── LayoutMismatchError      FAILED_PRECONDITION  another pair of workers, bounded; logged as an error
    ├── UnauthenticatedError     UNAUTHENTICATED      another worker, bounded; logged as an error
    ├── PermissionDeniedError    PERMISSION_DENIED    another worker, bounded; logged as an error
    ├── OverloadedError          RESOURCE_EXHAUSTED   another worker, then shed
    ├── UnavailableError         UNAVAILABLE          another worker
    ├── HandoffLostError         ABORTED              prefill again, bounded
    ├── TransferCorruptError     DATA_LOSS            prefill again, bounded; logged as an error
    ├── DeadlineError            DEADLINE_EXCEEDED    free both sides
    ├── ProtocolError            INTERNAL             another worker, bounded; logged as an error
    ├── CheckpointError          (start-up only)      the process does not start: the model's folder
    └── StartupError             (start-up only)      the process does not start: its settings, this machine

A handler raises one of these; `rpc.py` turns it into a status whose reason travels in trailing metadata, and back into
the error on the other side. Nothing else maps. The reactions are code in `headrace_router/requests/flow.py`; every
reason is in `reasons.py`.
"""

from __future__ import annotations

from typing import ClassVar


class HeadraceError(Exception):
    """Base class.

    `reason` is stable, UPPER_SNAKE_CASE, and safe for a client to switch on; the message is for people and says
    what is wrong and what to do.
    """

    status: ClassVar[str] = "INTERNAL"
    """Name of the gRPC status code that it becomes."""

    def __init__(self, reason: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.param = param
        """The request's field that is wrong, as its sender calls it; None: none is, or it is not known which."""


class InvalidRequestError(HeadraceError):
    """The request can never succeed as written."""

    status = "INVALID_ARGUMENT"


class NotFoundError(HeadraceError):
    """The thing named does not exist here."""

    status = "NOT_FOUND"


class LayoutMismatchError(HeadraceError):
    """Two workers can't hand off to each other: other model, layout or transports."""

    status = "FAILED_PRECONDITION"


class UnauthenticatedError(HeadraceError):
    """The caller did not show who it is."""

    status = "UNAUTHENTICATED"


class PermissionDeniedError(HeadraceError):
    """The caller is known, and may not do this."""

    status = "PERMISSION_DENIED"


class OverloadedError(HeadraceError):
    """There is no room now; another worker may have some.

    `retry_after_s` is how long the caller had better wait before it asks again; 0 leaves it to the caller.
    """

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, reason: str, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason, message)
        self.retry_after_s = retry_after_s


class UnavailableError(HeadraceError):
    """The process can't take work: starting, draining, gone."""

    status = "UNAVAILABLE"


class HandoffLostError(HeadraceError):
    """The pages are gone (lease ended, worker restarted, stale attempt); prefill again."""

    status = "ABORTED"


class TransferCorruptError(HeadraceError):
    """What was handed off is not what it was to be: the pages of other tokens, or other bytes."""

    status = "DATA_LOSS"


class DeadlineError(HeadraceError):
    """The caller's deadline passed."""

    status = "DEADLINE_EXCEEDED"


class ProtocolError(HeadraceError):
    """A peer sent what the protocol does not allow: bytes that are no message, or values that can't be."""


class CheckpointError(HeadraceError):
    """A checkpoint can't be served: unsupported, inconsistent, damaged, or too large for this machine."""

    status = "FAILED_PRECONDITION"


class StartupError(HeadraceError):
    """A process can't start as it was told to on this machine: an address, a file, a device, a size."""

    status = "FAILED_PRECONDITION"
