"""Rules of the wire that a process can be held to from outside, one by one, by name. See `conformance`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc

from headrace_core.errors import HeadraceError
from headrace_core.rpc import raised_from
from headrace_core.transfer.hold import TakeError

P = TypeVar("P")


class Broken(Exception):
    """A rule is broken; says how."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one rule; `problem` is empty if it is kept."""

    name: str
    problem: str


class Rules(Generic[P]):
    """Rules for one kind of process, which they see as `P`."""

    def __init__(self) -> None:
        self._checks: dict[str, Callable[[P], Awaitable[None]]] = {}

    @property
    def names(self) -> list[str]:
        """The rules, in order."""
        return list(self._checks)

    def rule(self, check: Callable[[P], Awaitable[None]]) -> Callable[[P], Awaitable[None]]:
        """Take the decorated function as the rule of its name; what it raises breaks the rule."""
        self._checks[check.__name__.replace("_", " ")] = check
        return check

    async def check(self, process: P, *, limit_s: float, only: str = "") -> list[Verdict]:
        """Hold `process` to each rule, or to the one named `only`; none may take longer than `limit_s`."""
        verdicts: list[Verdict] = []
        for name, check in self._checks.items():
            if only in ("", name):
                verdicts.append(Verdict(name, await _problem(check, process, limit_s)))
        return verdicts


async def _problem(check: Callable[[P], Awaitable[None]], process: P, limit_s: float) -> str:
    try:
        async with asyncio.timeout(limit_s):
            await check(process)
    except TimeoutError:
        return f"what had to happen did not within {limit_s:g} s"
    except TakeError as error:
        return f"{error.error.status} {error.error.reason}: {error.error}"
    except HeadraceError as error:
        return f"{error.status} {error.reason}: {error}"
    except grpc.RpcError as error:
        raised = raised_from(error)
        return f"{raised.status} {raised.reason}: {raised}"
    except Exception as error:  # noqa: BLE001 - the boundary: whatever a peer's answer made of us is that rule's failure
        return f"{type(error).__name__}: {error}" if not isinstance(error, Broken) else str(error)
    return ""


def require(is_met: bool, problem: str) -> None:
    """Break the rule with `problem` unless `is_met`."""
    if not is_met:
        raise Broken(problem)


def require_refusal(error: HeadraceError | None, status: str, *reasons: str) -> None:
    """Break the rule unless `error` has this status, and one of these reasons."""
    require(error is not None, f"it was to be refused with {status} {' or '.join(reasons)}")
    assert error is not None, "required"
    is_right = error.status == status and error.reason in reasons
    require(is_right, f"refused with {error.status} {error.reason}, not {status} {' or '.join(reasons)}")


EXPECTED: Mapping[str, str] = {
    "MODEL_MISMATCH": "FAILED_PRECONDITION",
    "LAYOUT_MISMATCH": "FAILED_PRECONDITION",
    "NO_COMMON_TRANSPORT": "FAILED_PRECONDITION",
    "TOKENS_MISMATCH": "DATA_LOSS",
    "CHECKSUM": "DATA_LOSS",
    "SHORT_READ": "DATA_LOSS",
    "BAD_REQUEST": "INVALID_ARGUMENT",
    "BAD_SAMPLING": "INVALID_ARGUMENT",
    "BAD_TOKEN": "INVALID_ARGUMENT",
    "EMPTY_PROMPT": "INVALID_ARGUMENT",
    "BAD_HANDOFF": "INVALID_ARGUMENT",
    "LEASE_ENDED": "ABORTED",
    "WORKER_RESTARTED": "ABORTED",
    "STALE_PAGE": "ABORTED",
    "STALE_ATTEMPT": "ABORTED",
    "TAKER_LOST": "ABORTED",
    "HOLDER_LOST": "ABORTED",
    "DEADLINE_EXCEEDED": "DEADLINE_EXCEEDED",
    "PROTOCOL": "INTERNAL",
}
"""The status of each reason with which a hand-off is refused."""
