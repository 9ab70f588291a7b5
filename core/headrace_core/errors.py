"""Every error that can cross a process boundary, the gRPC status each becomes, what the router does.

    HeadraceError                INTERNAL             fail the request, log, count
    ├── InvalidRequestError      INVALID_ARGUMENT     return to the client
    ├── NotFoundError            NOT_FOUND            return to the client
    ├── ConflictError            ALREADY_EXISTS       return to the caller
    ├── LayoutMismatchError      FAILED_PRECONDITION  another pair of workers, bounded; logged as an error
    ├── OverloadedError          RESOURCE_EXHAUSTED   another worker, then shed
    ├── UnavailableError         UNAVAILABLE          another worker
    ├── HandoffLostError         ABORTED              prefill again, bounded
    ├── TransferCorruptError     DATA_LOSS            prefill again, bounded; logged as an error
    ├── DeadlineError            DEADLINE_EXCEEDED    free both sides
    └── CheckpointError          (start-up only)      the process does not start

A handler raises one of these; the server interceptor (`rpc.py`) turns it into a status whose reason
travels in trailing metadata; `from_status` turns it back on the other side. Nothing else maps.
The reactions are code in `headrace_router/flow.py`.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class HeadraceError(Exception):
    """Base class.

    `reason` is stable, UPPER_SNAKE_CASE, and safe for a client to switch on; the message is for people and says
    what is wrong and what to do.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class InvalidRequestError(HeadraceError):
    """The request can never succeed as written."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(HeadraceError):
    """The thing named does not exist here."""

    code = grpc.StatusCode.NOT_FOUND


class ConflictError(HeadraceError):
    """The thing to be made exists already."""

    code = grpc.StatusCode.ALREADY_EXISTS


class LayoutMismatchError(HeadraceError):
    """Two workers can't hand off to each other: other model, layout or transports."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class OverloadedError(HeadraceError):
    """There is no room now; another worker may have some."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(HeadraceError):
    """The process can't take work: starting, draining, gone."""

    code = grpc.StatusCode.UNAVAILABLE


class HandoffLostError(HeadraceError):
    """The pages are gone (lease expired, worker restarted, stale attempt); prefill again."""

    code = grpc.StatusCode.ABORTED


class TransferCorruptError(HeadraceError):
    """Bytes arrived that are not what the ticket promised."""

    code = grpc.StatusCode.DATA_LOSS


class DeadlineError(HeadraceError):
    """The caller's deadline passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class CheckpointError(HeadraceError):
    """A checkpoint can't be served: unsupported, inconsistent, damaged, or too large for this machine."""

    code = grpc.StatusCode.FAILED_PRECONDITION


_BY_CODE: dict[grpc.StatusCode, type[HeadraceError]] = {
    error.code: error
    for error in (
        InvalidRequestError,
        NotFoundError,
        ConflictError,
        LayoutMismatchError,
        OverloadedError,
        UnavailableError,
        HandoffLostError,
        TransferCorruptError,
        DeadlineError,
    )
}


def from_status(code: grpc.StatusCode, reason: str, message: str) -> HeadraceError:
    """Return the error that a status stands for; an unknown code becomes a plain `HeadraceError`."""
    return _BY_CODE.get(code, HeadraceError)(reason, message)
