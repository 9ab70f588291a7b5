"""From a client's message to a checked request: everything that can be refused is refused here, before it queues.

Checks that need only the message come first, then the tokenizer, then what depends on the fleet (vocabulary, context).
An explicit `max_tokens` past the context window is no error: the sample ends with LENGTH where the window does.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from headrace.v1 import generation_service_pb2, types_pb2
from headrace_core.errors import InvalidRequestError, NotFoundError
from headrace_core.request import (
    DEFAULT_MAX_TOKENS,
    MAX_SAMPLES,
    SamplingParams,
    check_request_id,
    check_token_ids,
)
from headrace_core.wire import decode_sampling, encode_sampling

from headrace_router.registry import FleetModel
from headrace_router.tokenizer import CHAT_ROLES, Tokenizer

T = TypeVar("T")

_INLINE_BYTES = 2048
"""Shorter prompts are tokenized at once: a thread would cost more."""
_TOKEN_ID_BYTES = 4
_ID_BYTES = 12


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """A request that can succeed, as far as the router can tell."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    """With seed and `max_tokens` filled in."""
    sampling: types_pb2.SamplingParams
    """For workers: `params` without the stop strings, which are the router's business."""
    num_samples: int
    include_timings: bool
    is_continuation: bool
    """False for a conversation: its answer is a text of its own."""
    silent_ids: frozenset[int]
    """Ids that end a sample and have no text."""
    arrival_s: float
    tokenized_s: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A request checked as far as it can be without knowing the fleet."""

    message: generation_service_pb2.GenerateRequest
    request_id: str
    params: SamplingParams
    prompt_ids: list[int]
    arrival_s: float
    deadline_s: float
    tokenized_s: float


class Admission:
    """Checks and tokenizes. Event loop only."""

    def __init__(self, tokenizer: Tokenizer, *, model_name: str, max_prompt_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._max_prompt_bytes = max_prompt_bytes
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")

    async def tokenize(
        self, message: generation_service_pb2.GenerateRequest, *, arrival_s: float, deadline_s: float
    ) -> Tokenized:
        """Check what the message alone says, and tokenize its prompt.

        Raises:
            InvalidRequestError: BAD_REQUEST, BAD_SAMPLING, EMPTY_PROMPT or PROMPT_TOO_LONG.
            NotFoundError: UNKNOWN_MODEL.
        """
        if message.request_id:
            check_request_id(message.request_id)
        if message.model and message.model != self._model_name:
            raise NotFoundError("UNKNOWN_MODEL", f"model {message.model[:80]!r} is not served; {self._model_name!r} is")
        if message.HasField("n") and not 1 <= message.n <= MAX_SAMPLES:
            raise InvalidRequestError("BAD_REQUEST", f"n is {message.n}; it must be 1 to {MAX_SAMPLES}")
        params = decode_sampling(message.sampling)
        prompt_ids = await self._prompt_ids(message)
        if not prompt_ids:
            raise InvalidRequestError("EMPTY_PROMPT", "the prompt has no tokens")
        return Tokenized(
            message=message,
            request_id=message.request_id or secrets.token_hex(_ID_BYTES),
            params=params,
            prompt_ids=prompt_ids,
            arrival_s=arrival_s,
            deadline_s=deadline_s,
            tokenized_s=time.monotonic(),
        )

    def admit(self, tokenized: Tokenized, model: FleetModel) -> RequestSpec:
        """Check against what the fleet serves and fill in what the client left to us.

        Raises:
            InvalidRequestError: PROMPT_TOO_LONG or BAD_TOKEN.
        """
        message, params, num_prompt = tokenized.message, tokenized.params, len(tokenized.prompt_ids)
        if num_prompt >= model.max_context_tokens:
            raise InvalidRequestError(
                "PROMPT_TOO_LONG",
                f"the prompt has {num_prompt} tokens; with at least one of output the model's context holds "
                f"{model.max_context_tokens}",
            )
        if max(tokenized.prompt_ids) >= model.vocab_size:
            check_token_ids(tokenized.prompt_ids, model.vocab_size, "prompt")
        params.validate_tokens(model.vocab_size)
        room = model.max_context_tokens - num_prompt
        max_tokens = min(params.max_tokens or DEFAULT_MAX_TOKENS, room)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        params = replace(params, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens), seed=seed)
        eos_ids = () if params.ignore_eos else model.eos_token_ids
        return RequestSpec(
            request_id=tokenized.request_id,
            prompt_ids=tokenized.prompt_ids,
            params=params,
            sampling=encode_sampling(replace(params, stop_strings=())),
            num_samples=message.n if message.HasField("n") else 1,
            include_timings=message.include_timings,
            is_continuation=message.WhichOneof("input") != "chat",
            silent_ids=frozenset((*params.stop_token_ids, *eos_ids)),
            arrival_s=tokenized.arrival_s,
            tokenized_s=tokenized.tokenized_s,
            deadline_s=tokenized.deadline_s,
        )

    async def _prompt_ids(self, message: generation_service_pb2.GenerateRequest) -> list[int]:
        match message.WhichOneof("input"):
            case "text":
                text = message.text.text
                if not text:
                    raise InvalidRequestError("EMPTY_PROMPT", "the prompt is empty")
                num_bytes = self._check_size(len(text.encode()))
                if num_bytes <= _INLINE_BYTES:
                    return self._tokenizer.encode_text(text)
                return await self._in_thread(self._tokenizer.encode_text, text)
            case "tokens":
                self._check_size(_TOKEN_ID_BYTES * len(message.tokens.token_ids))
                return list(message.tokens.token_ids)
            case "chat":
                return await self._chat_ids(message.chat)
            case None:
                raise InvalidRequestError("EMPTY_PROMPT", "send one of `text`, `tokens` and `chat`")

    async def _chat_ids(self, chat: generation_service_pb2.ChatPrompt) -> list[int]:
        messages = [(message.role, message.content) for message in chat.messages]
        if not messages:
            raise InvalidRequestError("EMPTY_PROMPT", "the conversation has no messages")
        for role, _ in messages:
            if role not in CHAT_ROLES:
                raise InvalidRequestError("BAD_REQUEST", f"role {role[:32]!r} must be one of {', '.join(CHAT_ROLES)}")
        num_bytes = self._check_size(sum(len(content.encode()) for _, content in messages))
        if num_bytes <= _INLINE_BYTES:
            return self._tokenizer.encode_chat(messages)
        return await self._in_thread(self._tokenizer.encode_chat, messages)

    async def _in_thread(self, encode: Callable[[T], list[int]], prompt: T) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode, prompt)

    def _check_size(self, num_bytes: int) -> int:
        if num_bytes > self._max_prompt_bytes:
            raise InvalidRequestError(
                "PROMPT_TOO_LONG", f"the prompt has {num_bytes} bytes; this router takes {self._max_prompt_bytes}"
            )
        return num_bytes
