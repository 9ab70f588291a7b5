"""What a server lets in: a call is refused before its message is read, and what is read and held is bounded.

    ARRIVED ──guards, a place──► WAITING ──a reader's turn──► READING ──message──► INSIDE ──► GONE
       └───── refused ──────────────┴──── refused, too slow ─────┘

Flow control keeps an unread message at the caller's side, but for one window (`rpc.py`), so that a call that is refused
costs no memory, whatever its size. Places, turns and bytes are shared (`shares.py`); places and bytes are given back
when the call ends, however it ends.
"""

from __future__ import annotations

import asyncio
import ipaddress
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio

from headrace_core.endable import EndableWait
from headrace_core.errors import HeadraceError, InvalidRequestError, OverloadedError
from headrace_core.shares import Caller, Pot, Turns

T = TypeVar("T")


class Call:
    """A call that wants in."""

    def __init__(self, method: str, caller: Caller, context: Any) -> None:
        self.method = method
        """Its full name, `/headrace.v1.GenerationService/Generate`."""
        self.caller = caller
        self.context = context
        """grpc's, for its metadata."""
        self.wait: EndableWait | None = None
        """For its message."""
        self.has_turn = False
        """Whether its message is being read."""

    def refuse(self, error: HeadraceError) -> bool:
        """End its wait for a turn with `error`; return False if it is not, or no more, waiting for one."""
        return self.wait is not None and not self.has_turn and self.wait.end(error)


Guard = Callable[[Call], AbstractContextManager[None]]
"""Entered when a call arrives, left when its message has been read; raises the `HeadraceError` that refuses it."""

OnRefused = Callable[[str, HeadraceError | None], None]
"""Takes the method of a call that did not come in and what refused it; None if the caller left."""

RETRY_AFTER_S = 0.5
"""What a caller is told that found no room."""


@dataclass(frozen=True, slots=True)
class MethodLimits:
    """What one method's calls may take."""

    open_calls: int = 4096
    """At a time."""
    readers: int = 16
    """Calls whose message is being read; each may cost the largest message."""
    message_bytes: int = 1 << 30
    """Of open calls' messages together, as they came."""
    max_parts: int | None = None
    """Fields that a message may have, as `message_parts` counts them; None: as many as fit."""
    message_timeout_s: float = 10.0
    """How long a message may take to arrive, and a call may wait until it is read."""
    patience_s: float = 2.0
    """How long it may take while other calls wait for the reader's turn."""


def address_of(context: Any) -> str:
    """Return the host that a call comes from; an IPv6 network of 64 bits, which one host may own, counts as one."""
    peer = urllib.parse.unquote(context.peer())
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0]
    if kind == "ipv4":
        return host
    if kind != "ipv6":
        return peer
    address = ipaddress.IPv6Address(host.strip("[]").partition("%")[0])
    return str(address.ipv4_mapped or ipaddress.IPv6Network((address, 64), strict=False))


def caller_at(context: Any) -> Caller:
    """Return the caller of whom nothing is known but its address."""
    address = address_of(context)
    return Caller(address, address)


def _ignore(method: str, error: HeadraceError | None) -> None:
    del method, error


class Door:
    """The limits of one server, kept. Event loop only."""

    def __init__(
        self,
        limits: MethodLimits = MethodLimits(),
        *,
        methods: Mapping[str, MethodLimits] | None = None,
        guards: Sequence[Guard] = (),
        caller_of: Callable[[Any], Caller] = caller_at,
        on_refused: OnRefused = _ignore,
    ) -> None:
        """Take what to ask.

        Args:
            limits: of each method that is not in `methods`, for itself.
            methods: by full name.
            guards: what else may refuse a call, in order.
            caller_of: whose share a call takes, by its context.
            on_refused: told of each call that does not come in.
        """
        self._default = limits
        self._methods = dict(methods or {})
        self._guards = guards
        self._caller_of = caller_of
        self._on_refused = on_refused
        self._rooms: dict[str, _Room] = {}

    def max_parts(self, method: str) -> int | None:
        """Return how many parts a message of `method` may have."""
        return self._limits(method).max_parts

    def _limits(self, method: str) -> MethodLimits:
        return self._methods.get(method, self._default)

    def enter(self, method: str, context: Any) -> None:
        """Let a call in that reads its messages itself.

        Raises:
            HeadraceError: it is refused.
        """
        try:
            call = Call(method, self._caller_of(context), context)
            with ExitStack() as guards:
                self._let_in(call, guards)
        except HeadraceError as error:
            self._on_refused(method, error)
            raise

    async def receive(self, method: str, context: Any, decode: Callable[[bytes], T]) -> T:
        """Let a call in and return its one message, decoded.

        Raises:
            HeadraceError: it is refused: by a guard or `decode`; QUEUE_FULL, there is no place, turn or memory for it;
                MESSAGE_TIMEOUT; BAD_REQUEST, it ended without a message, or its message is larger than grpc takes.
        """
        try:
            call = Call(method, self._caller_of(context), context)
            with ExitStack() as guards:
                room = self._let_in(call, guards)
                message: Any = await self._read(call, room.turns)
                if message is not grpc.aio.EOF:
                    _take(room.messages, call, len(message), "bytes of messages are held")
                    return decode(message)
        except HeadraceError as error:
            self._on_refused(method, error)
            raise
        except asyncio.CancelledError:
            self._on_refused(method, None)
            raise
        # grpc says the same when the caller left and when it has refused a message that is too large.
        self._on_refused(method, None)
        raise InvalidRequestError("BAD_REQUEST", "the call ended before a message came")

    def _let_in(self, call: Call, guards: ExitStack) -> _Room:
        for guard in self._guards:
            guards.enter_context(guard(call))
        room = self._rooms.get(call.method)
        if room is None:
            room = self._rooms[call.method] = _Room(self._limits(call.method))
        _take(room.places, call, 1, "calls are open")
        return room

    async def _read(self, call: Call, turns: Turns) -> Any:
        call.wait = EndableWait(self._limits(call.method).message_timeout_s)
        try:
            async with call.wait, turns.turn(call.caller, call.wait.timer):
                call.has_turn = True
                return await call.context.read()
        except TimeoutError:
            if call.has_turn:
                problem = "the request's message took too long to arrive"
                raise OverloadedError("MESSAGE_TIMEOUT", problem, retry_after_s=RETRY_AFTER_S) from None
            problem = "too many messages arrive at once; try again later"
            raise OverloadedError("QUEUE_FULL", problem, retry_after_s=RETRY_AFTER_S) from None


class _Room:
    """What one method's calls share."""

    def __init__(self, limits: MethodLimits) -> None:
        self.places = Pot(limits.open_calls)
        self.turns = Turns(limits.readers, patience_s=limits.patience_s)
        self.messages = Pot(limits.message_bytes)


def _take(pot: Pot, call: Call, amount: int, what: str) -> None:
    """Give a call its share until it ends, however it does: a generator that nobody reads on has no `finally`.

    Raises:
        OverloadedError: QUEUE_FULL.
    """
    caller = call.caller
    if not pot.take(caller, amount):
        raise OverloadedError(
            "QUEUE_FULL",
            f"{pot.taken} {what}, {pot.held(caller)} for you, and there is room for {pot.total}; try again later",
            retry_after_s=RETRY_AFTER_S,
        )

    def on_done(_: Any) -> None:
        pot.give_back(caller, amount)

    call.context.add_done_callback(on_done)
