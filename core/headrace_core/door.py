"""What a server lets in: a call is refused before its message is read, and what is read and held is bounded.

    ARRIVED ──a place, guards──► WAITING ──a reader's turn──► READING ──message──► INSIDE ──► GONE
       └───── refused ──────────────┴──── refused, too slow ─────┘

Flow control keeps an unread message at the caller's side, but for one window (`rpc.py`), so that a call that is refused
costs no memory, whatever its size. Places, turns and bytes are shared (`shares.py`); places and bytes are given back
when the call ends, however it ends. A call that sends a stream of messages waits for a turn before each of them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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
        return not self.has_turn and self.end(error)

    def end(self, error: HeadraceError) -> bool:
        """End its wait for a message with `error`; return False if it has not begun or is over."""
        return self.wait is not None and self.wait.end(error)


Guard = Callable[[Call], Callable[[], None] | None]
"""Asked when a call has its place; raises the `HeadraceError` that refuses it, or returns what is to be done when its
message has been read, or at once if it sends a stream of them; None: nothing."""

OnRefused = Callable[[str, HeadraceError | None], None]
"""Takes the method of a call that did not come in, or whose next message did not, and what refused it; None if it ended
before its message came: the caller left, or the message is larger than grpc takes, which are alike from here."""

RETRY_AFTER_S = 0.5
"""What a caller is told that found no room."""
_ENDING_S = 0.02
"""After a call's last message: how long grpc may take to say that the call itself has ended."""


@dataclass(frozen=True, slots=True)
class MethodLimits:
    """What one method's calls may take."""

    open_calls: int = 4096
    """At a time."""
    readers: int = 16
    """Calls whose message is being read; each may cost the largest message."""
    message_bytes: int = 1 << 30
    """Of open calls' messages together, as they came."""
    max_message_bytes: int | None = None
    """Of one message, once it has come; None: as many as grpc takes."""
    max_parts: int | None = None
    """Fields that a message may have, as `message_parts` counts them; None: as many as fit."""
    message_timeout_s: float = 10.0
    """How long a message may take to arrive, and a call may wait until it is read."""
    patience_s: float = 2.0
    """How long it may take while other calls wait for the reader's turn."""


STREAM_LIMITS = MethodLimits(open_calls=64, readers=2, message_bytes=1 << 20, max_message_bytes=64 << 10)
"""Of a method that takes a stream of messages, unless it is named: that is reflection, which needs no token."""

MOST_SESSIONS = 256
"""A router has one; those of one address have half at most."""
_LONG_CALL = MethodLimits(open_calls=8192, readers=8192, message_timeout_s=60.0)
LONG_CALLS = {
    "/headrace.v1.DecodeService/Session": replace(_LONG_CALL, open_calls=MOST_SESSIONS, readers=MOST_SESSIONS),
    "/headrace.v1.HoldService/Hold": _LONG_CALL,
}
"""Calls between our processes that last as long as what they are about, by method. With as many readers as calls nobody
waits for a turn, which would end another's; of silence both ends hear sooner (`beats.py`)."""


def address_of(context: Any) -> str:
    """Return the host that a call comes from; an IPv6 network of 64 bits, which one host may own, counts as one."""
    return _host_of(context.peer())


@lru_cache(maxsize=4096)
def _host_of(peer: str) -> str:
    peer = urllib.parse.unquote(peer)
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0]
    if kind == "ipv4":
        return host
    if kind != "ipv6":
        return peer
    address = ipaddress.IPv6Address(host.strip("[]").partition("%")[0])
    return str(address.ipv4_mapped or ipaddress.IPv6Network((address, 64), strict=False))


def is_local(context: Any) -> bool:
    """Return whether a call comes over this machine's loopback, of which IPv6 has one network."""
    address = address_of(context)
    return address.startswith("127.") or address == "::/64"


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
        self._guards = list(guards)
        self._caller_of = caller_of
        self._on_refused = on_refused
        self._rooms: dict[str, _Room] = {}
        self._messages: dict[Any, _Share] = {}
        """Of open calls, by context."""

    def ask_first(self, guard: Guard) -> None:
        """Ask `guard` before all others."""
        self._guards.insert(0, guard)

    def max_parts(self, method: str) -> int | None:
        """Return how many parts a message of `method` may have."""
        return self._methods.get(method, self._default).max_parts

    def enter(self, method: str, context: Any, decode: Callable[[bytes], T]) -> AsyncIterator[T]:
        """Let a call in that sends a stream of messages, and return them, each decoded when it is asked for.

        Raises:
            HeadraceError: it is refused, now or where a message is asked for, as by `receive`; its stream may be empty.
        """
        try:
            call = Call(method, self._caller_of(context), context)
            leave: list[Callable[[], None]] = []
            try:
                room = self._let_in(call, STREAM_LIMITS, leave)
            finally:
                _leave(leave)
        except HeadraceError as error:
            self._on_refused(method, error)
            raise
        return self._each(call, room, decode)

    async def _each(self, call: Call, room: _Room, decode: Callable[[bytes], T]) -> AsyncIterator[T]:
        share = _Share(room.messages, call, "bytes of messages are held")
        while True:
            try:
                message = await self._read(call, room)
                if message is None:
                    return
                share.take(len(message))
                decoded = decode(message)
            except HeadraceError as error:
                self._on_refused(call.method, error)
                raise
            yield decoded
            share.give_back()

    async def receive(self, method: str, context: Any, decode: Callable[[bytes], T]) -> T:
        """Let a call in and return its one message, decoded.

        Raises:
            HeadraceError: it is refused: by a guard or `decode`; QUEUE_FULL, there is no place, turn or memory for it;
                MESSAGE_TIMEOUT; BAD_REQUEST, it sent no message, or one that is too large for the method.
        """
        leave: list[Callable[[], None]] = []
        try:
            call = Call(method, self._caller_of(context), context)
            room = self._let_in(call, self._default, leave)
            message = await self._read(call, room)
            if message is None:
                raise InvalidRequestError("BAD_REQUEST", "the call ended before a message came")
            share = self._messages[context] = _Share(room.messages, call, "bytes of messages are held")
            context.add_done_callback(self._messages.pop)
            share.take(len(message))
            return decode(message)
        except HeadraceError as error:
            self._on_refused(method, error)
            raise
        except asyncio.CancelledError:
            self._on_refused(method, None)
            raise
        finally:
            _leave(leave)

    def forget_message(self, context: Any) -> None:
        """Give back the bytes of a call's message before the call ends: nothing of it is kept any more. Idempotent."""
        if share := self._messages.get(context):
            share.give_back()

    def _let_in(self, call: Call, default: MethodLimits, leave: list[Callable[[], None]]) -> _Room:
        """Give a call its place, and ask the guards; `leave` gets what is to be done when its message has been read."""
        room = self._rooms.get(call.method)
        if room is None:
            room = self._rooms[call.method] = _Room(self._methods.get(call.method, default))
        _Share(room.places, call, "calls are open").take(1)
        for guard in self._guards:
            if (after := guard(call)) is not None:
                leave.append(after)
        return room

    async def _read(self, call: Call, room: _Room) -> bytes | None:
        """Return a call's next message; None after its last."""
        limits = room.limits
        if (message := _whole_message(call.context)) is not None:  # what has come already takes no turn from anybody
            return self._fit(call, limits, message)
        call.wait, call.has_turn = EndableWait(limits.message_timeout_s), False
        try:
            async with call.wait, room.turns.turn(call.caller, call.wait.timer):
                call.has_turn = True
                message = await call.context.read()
        except TimeoutError:
            if call.has_turn:
                problem = "the request's message took too long to arrive"
                raise OverloadedError("MESSAGE_TIMEOUT", problem, retry_after_s=RETRY_AFTER_S) from None
            problem = "too many messages arrive at once; try again later"
            raise OverloadedError("QUEUE_FULL", problem, retry_after_s=RETRY_AFTER_S) from None
        if message is grpc.aio.EOF:
            await asyncio.sleep(_ENDING_S)  # if grpc has ended the call, it cancels us here
            return None
        return self._fit(call, limits, message)

    def _fit(self, call: Call, limits: MethodLimits, message: bytes) -> bytes:
        if limits.max_message_bytes is not None and len(message) > limits.max_message_bytes:
            problem = f"a message of {len(message)} bytes; {call.method} takes {limits.max_message_bytes}"
            raise InvalidRequestError("BAD_REQUEST", problem)
        return message


class _Room:
    """What one method's calls share."""

    def __init__(self, limits: MethodLimits) -> None:
        self.limits = limits
        self.places = Pot(limits.open_calls)
        self.turns = Turns(limits.readers, patience_s=limits.patience_s)
        self.messages = Pot(limits.message_bytes)


class _Share:
    """What a call holds of a pot until it ends, however it does: a generator that nobody reads on has no `finally`."""

    def __init__(self, pot: Pot, call: Call, what: str) -> None:
        self._pot = pot
        self._caller = call.caller
        self._what = what
        self._held = 0

        call.context.add_done_callback(self._on_done)

    def take(self, amount: int) -> None:
        """Hold `amount` more.

        Raises:
            OverloadedError: QUEUE_FULL.
        """
        pot, caller = self._pot, self._caller
        if not pot.take(caller, amount):
            raise OverloadedError(
                "QUEUE_FULL",
                f"{pot.taken} {self._what}, {pot.held(caller)} for you, and there is room for {pot.total}; "
                "try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        self._held += amount

    def give_back(self) -> None:
        """Hold nothing any more; idempotent."""
        held, self._held = self._held, 0
        if held:
            self._pot.give_back(self._caller, held)

    def _on_done(self, _: Any) -> None:
        self.give_back()


def _whole_message(context: Any) -> bytes | None:
    """Return a call's message if all of it has come, and nobody has read it; None where that is not known."""
    read_now: Callable[[], bytes | None] | None = getattr(context, "read_now", None)
    return read_now() if read_now is not None else None


def _leave(guards: Sequence[Callable[[], None]]) -> None:
    for after in reversed(guards):
        after()
