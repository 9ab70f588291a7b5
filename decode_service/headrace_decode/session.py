"""One router's stream of what happened. Event loop only.

    OPEN ──reader gone, silent, worker stopping──► CLOSED
     │ ▲
     │ └────────read───────────┐
     └──half the bound unread──► FULL ──not read for too long, or the whole bound──► CLOSED, its reader gets SLOW_READER

A reader that keeps up gets one message per step. While it does not, tokens coalesce by sequence, up to a bound in
bytes; while FULL, the session's rows pause and keep their pages. There is one writer, and no message is over 1 MiB.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headrace.v1 import decode_service_pb2 as pb
from headrace_core.beats import BEAT_S
from headrace_core.errors import HeadraceError, OverloadedError
from headrace_core.request import FinishReason, SampledToken
from headrace_core.wire import encode_finish, encode_logprobs

MOST_UNREAD_BYTES = 4 << 20
MOST_MESSAGE_BYTES = 1 << 20
PATIENCE_S = 10.0
"""How long a full session waits for its reader."""
_MOST_ENTRY_BYTES = 64 << 10
_ENTRY_BYTES = 32
_TOKEN_BYTES = 5
_LOGPROB_BYTES = 16
"""Bounds of what each takes on the wire, with its tags."""


@dataclass(slots=True, eq=False)
class _Unread:
    entry: pb.StepEntry
    num_bytes: int


class Session:
    """What a router has not read yet, and the numbers of its sequences; `keys` maps them to the scheduler's."""

    def __init__(
        self,
        router_id: int,
        group: int,
        *,
        on_full: Callable[[bool], None],
        on_slow: Callable[[HeadraceError], None],
        most_bytes: int = MOST_UNREAD_BYTES,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Args: `group` is its sequences' in the scheduler; `on_full` hears whether it is, `on_slow` must close it."""
        self.router_id = router_id
        self.group = group
        self.keys: dict[int, int] = {}
        self._on_full = on_full
        self._on_slow = on_slow
        self._most_bytes = most_bytes
        self._patience_s = patience_s
        self._loop = asyncio.get_running_loop()
        self._unread: deque[_Unread] = deque()
        self._growing: dict[int, _Unread] = {}
        """By sequence: its last unread entry, if that is one of tokens."""
        self._num_bytes = 0
        self._is_full = False
        self._step_us = 0
        self._read_s = self._loop.time()
        self._patience: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._all_read = asyncio.Event()
        self._all_read.set()
        self._error: HeadraceError | None = None

    def put_token(
        self, number: int, attempt: int, position: int, token: SampledToken, finish: FinishReason | None = None
    ) -> None:
        """Add a sequence's next token, with `finish` its last; the reader has it from the next `flush` on."""
        if self._error:
            return
        logprobs = token.logprobs
        size = _TOKEN_BYTES + (_LOGPROB_BYTES * (1 + len(logprobs.top)) if logprobs else 0)
        unread = self._growing.get(number)
        if unread is None or unread.num_bytes + size > _MOST_ENTRY_BYTES:
            entry = pb.StepEntry(sequence_number=number, attempt=attempt, position=position)
            unread = self._growing[number] = _Unread(entry, 0)
            self._unread.append(unread)
            size += _ENTRY_BYTES
        tokens = unread.entry.tokens
        tokens.token_ids.append(token.token_id)
        if logprobs:
            tokens.logprobs.append(encode_logprobs(logprobs))
        tokens.finish_reason = encode_finish(finish)
        unread.num_bytes += size
        self._count(size)

    def put(self, number: int, attempt: int, position: int, **event: Any) -> None:
        """Add another of a sequence's events, which is a field of `StepEntry`; the reader has it at once."""
        if self._error:
            return
        entry = pb.StepEntry(sequence_number=number, attempt=attempt, position=position, **event)
        unread = _Unread(entry, entry.ByteSize() + _TOKEN_BYTES)
        self._growing.pop(number, None)
        self._unread.append(unread)
        self._count(unread.num_bytes)
        self._news.set()

    async def wait_read(self) -> None:
        """Return when nothing that was put is unread, or the session is closed."""
        await self._all_read.wait()

    def flush(self, step_s: float) -> None:
        """Let the reader have what was put, as one step's message."""
        if self._unread:
            self._step_us = round(step_s * 1e6)
            self._news.set()

    def close(self, error: HeadraceError) -> None:
        """End the stream with `error`, now or when its reader reads again; drop what is unread. Idempotent."""
        if self._error:
            return
        self._error = error
        if self._is_full:
            self._on_full(False)
        self._unread.clear()
        self._growing.clear()
        if self._patience is not None:
            self._patience.cancel()
        self._news.set()
        self._all_read.set()

    async def next(self) -> pb.SessionResponse:
        """Wait for news and return them in one message; without any, a beat.

        Raises:
            HeadraceError: the session was closed.
        """
        try:
            async with asyncio.timeout(BEAT_S):
                await self._news.wait()
        except TimeoutError:
            return pb.SessionResponse()
        if self._error:
            raise self._error
        message = pb.SessionResponse(entries=self._take(), step_us=self._step_us)
        if not self._unread:
            self._news.clear()
            self._all_read.set()
        return message

    def _take(self) -> list[pb.StepEntry]:
        entries: list[pb.StepEntry] = []
        size = 0
        while self._unread and (not entries or size + self._unread[0].num_bytes <= MOST_MESSAGE_BYTES):
            unread = self._unread.popleft()
            size += unread.num_bytes
            entries.append(unread.entry)
            number = unread.entry.sequence_number
            if self._growing.get(number) is unread:
                del self._growing[number]
        self._num_bytes -= size
        self._read_s = self._loop.time()
        if self._is_full and self._num_bytes <= self._most_bytes // 4:
            self._is_full = False
            self._on_full(False)
        return entries

    def _count(self, size: int) -> None:
        self._num_bytes += size
        self._all_read.clear()
        if self._num_bytes > self._most_bytes:
            self._on_slow(_slow(self._num_bytes))
        elif self._num_bytes > self._most_bytes // 2 and not self._is_full:
            self._is_full = True
            self._on_full(True)
            if self._patience is None:
                self._patience = self._loop.call_later(self._patience_s, self._check_reader)

    def _check_reader(self) -> None:
        self._patience = None
        left_s = self._read_s + self._patience_s - self._loop.time()
        if not self._is_full:
            return
        if left_s <= 0:
            self._on_slow(_slow(self._num_bytes))
        else:
            self._patience = self._loop.call_later(left_s, self._check_reader)


def _slow(num_bytes: int) -> OverloadedError:
    return OverloadedError("SLOW_READER", f"{num_bytes} bytes wait to be read; read the stream faster")
