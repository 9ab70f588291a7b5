"""One router's stream of step outputs. Event loop only.

    OPEN ──reader gone, worker stopping──► CLOSED
      └────too much unread───────────────► CLOSED, the reader gets SLOW_READER

A reader that keeps up gets one message per step. While it does not, outputs coalesce by sequence, up to a bound.
"""

from __future__ import annotations

import asyncio

from headrace.v1 import decode_service_pb2
from headrace_core.errors import HeadraceError, OverloadedError
from headrace_core.request import FinishReason, SampledToken
from headrace_core.wire import encode_failure, encode_finish, encode_logprobs

MAX_UNREAD_TOKENS = 16_384
"""A message of so many tokens with all their log-probabilities stays below the message limit."""


class Session:
    """Outputs not yet sent, and the numbers of the sequences that make them; `keys` maps them to the scheduler's."""

    def __init__(self, session_id: str, *, max_unread_tokens: int = MAX_UNREAD_TOKENS) -> None:
        self.session_id = session_id
        self.keys: dict[int, int] = {}
        self._max_unread = max_unread_tokens
        self._unread: dict[int, decode_service_pb2.SequenceOutput] = {}
        self._num_unread = 0
        self._step_us = 0
        self._news = asyncio.Event()
        self._error: HeadraceError | None = None

    def put_token(self, number: int, token: SampledToken, finish: FinishReason | None) -> None:
        """Add a sequence's next token.

        Raises:
            OverloadedError: SLOW_READER; the session must be closed.
        """
        output = self._output(number)
        output.token_ids.append(token.token_id)
        if token.logprobs:
            output.logprobs.append(encode_logprobs(token.logprobs))
        output.finish_reason = encode_finish(finish)
        self._num_unread += 1
        if self._num_unread > self._max_unread:
            raise OverloadedError("SLOW_READER", f"{self._num_unread} tokens wait to be read; read the stream faster")

    def put_failure(self, number: int, error: HeadraceError) -> None:
        """Add a sequence's end."""
        self._output(number).failure.CopyFrom(encode_failure(error))
        self._news.set()

    def flush(self, step_s: float) -> None:
        """Let the reader have what was put, as one step's message."""
        if self._unread:
            self._step_us = round(step_s * 1e6)
            self._news.set()

    def close(self, error: HeadraceError) -> None:
        """End the stream with `error`, now or when its reader reads again; drop what is unread. Idempotent."""
        self._error = self._error or error
        self._unread.clear()
        self._news.set()

    async def next(self) -> decode_service_pb2.StreamStepsResponse:
        """Wait for news and return them in one message.

        Raises:
            HeadraceError: the session was closed.
        """
        await self._news.wait()
        if self._error:
            raise self._error
        self._news.clear()
        outputs, self._unread, self._num_unread = self._unread, {}, 0
        return decode_service_pb2.StreamStepsResponse(outputs=outputs.values(), step_us=self._step_us)

    def _output(self, number: int) -> decode_service_pb2.SequenceOutput:
        if number not in self._unread:
            self._unread[number] = decode_service_pb2.SequenceOutput(sequence_number=number)
        return self._unread[number]
