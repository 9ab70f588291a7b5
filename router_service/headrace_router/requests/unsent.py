"""What a sample's client has not been sent yet. It piles up while the client does not read; event loop only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from headrace.v1 import types_pb2

from headrace_router.requests.piece import Ending, Piece

_MOST_TOKENS, _MOST_LOGPROBS, _MOST_CHARS = 4096, 1024, 1 << 20
"""What one message to the client holds at most: with 20 log-probabilities a token, each with the token's bytes, at most
six of 8 MiB."""


class Unsent:
    """One sample's."""

    def __init__(self, sample_index: int, token_ids: list[int]) -> None:
        """Args: `token_ids` are all that the sample has, to which it appends."""
        self.text = ""
        self.logprobs: list[types_pb2.TokenLogprobs] = []
        self._prompt: deque[types_pb2.PromptLogprobs] = deque()
        self._sample_index = sample_index
        self._token_ids = token_ids
        self._num_sent = 0
        self._is_introduced = False

    @property
    def is_empty(self) -> bool:
        """True if the client has been sent everything."""
        return self._num_sent == len(self._token_ids) and not self.text and not self._prompt

    def add_prompt_logprobs(self, logprobs: types_pb2.PromptLogprobs) -> None:
        """Keep a copy, as `add_logprobs` does."""
        copy = types_pb2.PromptLogprobs()
        copy.CopyFrom(logprobs)
        self._prompt.append(copy)

    def skip(self) -> None:
        """Take note that the client was sent all tokens that there are, some other way."""
        self._num_sent = len(self._token_ids)

    def add_logprobs(self, logprobs: Iterable[types_pb2.TokenLogprobs]) -> None:
        """Keep copies: what is a part of a step's message keeps all of it in memory."""
        for each in logprobs:
            copy = types_pb2.TokenLogprobs()
            copy.CopyFrom(each)
            self.logprobs.append(copy)

    def take(self, close: Callable[[], Ending] | None) -> Piece:
        """Return as much as a message may hold; it counts as sent.

        Args:
            close: of a sample that has ended: makes what its last piece says of it.
        """
        if self._prompt:
            is_first, self._is_introduced = not self._is_introduced, True
            return Piece(self._sample_index, "", (), (), is_first, None, self._prompt.popleft())
        num_tokens, text = len(self._token_ids), self.text
        is_whole = num_tokens - self._num_sent <= _MOST_TOKENS and len(text) <= _MOST_CHARS
        if is_whole and close is None and self._is_introduced and not self.logprobs:  # as nearly all are
            token_ids = self._token_ids[self._num_sent :]
            self._num_sent, self.text = num_tokens, ""
            return Piece(self._sample_index, text, token_ids, (), False, None)
        most = _MOST_LOGPROBS if self.logprobs else _MOST_TOKENS
        end = self._num_sent + most
        text, token_ids = text[:_MOST_CHARS], self._token_ids[self._num_sent : end]
        self.text = self.text[_MOST_CHARS:]
        self._num_sent = min(end, num_tokens)
        logprobs = self.logprobs[:most]
        del self.logprobs[:most]
        is_first, self._is_introduced = not self._is_introduced, True
        ending = close() if close is not None and self.is_empty else None
        return Piece(self._sample_index, text, token_ids, logprobs, is_first, ending)
