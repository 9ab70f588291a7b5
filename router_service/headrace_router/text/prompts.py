"""From what a client sent to token ids, in bounded time and memory whoever sent what.

    text  ─────────────────────────────────────┐
    chat ── render (chat_renderer.py) ── text ─┴─► size ──► encode: at once, or on the thread of its size ──► ids
    tokens ────────────────────────────────────────────────────────────────────────────────────────────────► ids

What can be refused by size is, before it costs anything: by the router's own limit, and by the fewest tokens that so
many bytes can have, where the tokenizer lets that be known (`token_size.py`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from headrace.v1 import generation_service_pb2
from headrace_core.errors import InvalidRequestError
from headrace_core.grammar import check_grammar
from headrace_core.request import Grammar
from headrace_core.shares import Caller

from headrace_router.text.chat_protocol import Conversation, TemplateSource
from headrace_router.text.chat_renderer import ChatRenderer
from headrace_router.text.size_lanes import SizeLanes
from headrace_router.text.tokenizer import Tokenizer, check_num_tokens

CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_CHAT_MESSAGES = 4096
_MESSAGE_BYTES = 64
"""What a message of a conversation costs besides its words."""
_TOKEN_ID_BYTES = 4
_INLINE_BYTES = 2048
"""Shorter texts are tokenized at once, in about a millisecond: a thread would cost more."""
_LANE_BYTES = [32 << 10, 512 << 10]
"""Encoding does 1 to 2 MB/s: up to 30 ms, up to 0.5 s, longer."""
_SLICE_IDS = 16384
"""Token ids are looked at so many at once, in about half a millisecond; the event loop does other work in between."""


@dataclass(slots=True)
class PromptLimits:
    """What bounds one prompt: `max_tokens` is one less than the context of the fleet's model."""

    caller: Caller
    """Whose share of the threads it is tokenized in."""
    deadline_s: float
    """By `time.monotonic`."""
    max_tokens: int


@dataclass(slots=True)
class Prompt:
    """What a request's prompt came to; `largest_id` is of `token_ids`, which are never empty."""

    token_ids: list[int]
    largest_id: int


class Prompts:
    """Event loop only."""

    def __init__(self, tokenizer: Tokenizer, *, max_bytes: int, plain_user_text: bool = False) -> None:
        """Prepare for prompts.

        Args:
            tokenizer: the model's.
            max_bytes: of the largest, UTF-8; a token id counts as four.
            plain_user_text: what users and tools say in a conversation has no control tokens (`control_text.py`).

        Raises:
            CheckpointError: BAD_TOKENIZER, its control tokens can't be kept out.
        """
        self._tokenizer = tokenizer
        self._max_bytes = max_bytes
        self._lanes = SizeLanes("tokenize", _LANE_BYTES)
        config = tokenizer.config
        control_texts = tokenizer.control_texts if plain_user_text else []
        source = TemplateSource(config.templates, config.special_tokens, control_texts) if config.templates else None
        self._has_developer = source is not None and source.knows("developer")
        self._chat = ChatRenderer(source, max_text_bytes=max_bytes, problem=config.template_problem)

    def start(self) -> None:
        """Prepare for conversations in the background; `close` must follow."""
        self._chat.start()

    async def close(self) -> None:
        """End threads and processes; idempotent."""
        self._lanes.close()
        await self._chat.close()

    def read_now(self, message: generation_service_pb2.GenerateRequest, max_tokens: int) -> Prompt | None:
        """Return the message's prompt if it is a short text; None: `read` takes it. Raises as that does."""
        if message.WhichOneof("input") != "text":
            return None
        text = message.text.text
        if not text or len(text) > _INLINE_BYTES:
            return None
        num_bytes = self._check_size(len(text.encode()))
        if num_bytes > _INLINE_BYTES:
            return None
        self._tokenizer.check_size(num_bytes, max_tokens)
        prompt = self._tokens_of(text, max_tokens, with_special=True)
        return prompt if prompt.token_ids else None

    async def read(self, message: generation_service_pb2.GenerateRequest, limits: PromptLimits) -> Prompt:
        """Return the message's prompt.

        Raises:
            InvalidRequestError: EMPTY_PROMPT, PROMPT_TOO_LONG, BAD_REQUEST.
            DeadlineError: DEADLINE_EXCEEDED.
            UnavailableError: DRAINING.
        """
        match message.WhichOneof("input"):
            case "text":
                if not message.text.text:
                    raise InvalidRequestError("EMPTY_PROMPT", "the prompt is empty")
                prompt = await self._encode(message.text.text, limits, with_special=True)
            case "tokens":
                prompt = await self._read_ids(message.tokens, limits)
            case "chat":
                prompt = await self._encode(await self._render(message.chat, limits), limits, with_special=False)
            case None:
                raise InvalidRequestError("EMPTY_PROMPT", "send one of `text`, `tokens` and `chat`")
        if not prompt.token_ids:
            raise InvalidRequestError("EMPTY_PROMPT", "the prompt has no tokens")
        return prompt

    async def check_grammar(self, grammar: Grammar, caller: Caller, *, deadline_s: float) -> None:
        """Check that an answer can be held to a grammar; on the thread that short texts are tokenized on.

        Raises:
            InvalidRequestError: BAD_GRAMMAR.
            DeadlineError: DEADLINE_EXCEEDED.
            UnavailableError: DRAINING.
        """
        await self._lanes.run(0, caller, deadline_s, lambda _: check_grammar(grammar))

    async def _encode(self, text: str, limits: PromptLimits, *, with_special: bool) -> Prompt:
        num_bytes = self._check_size(len(text.encode()))
        self._tokenizer.check_size(num_bytes, limits.max_tokens)

        def encode(_: int = 0) -> Prompt:
            return self._tokens_of(text, limits.max_tokens, with_special=with_special)

        if num_bytes <= _INLINE_BYTES:
            return encode()
        return await self._lanes.run(num_bytes, limits.caller, limits.deadline_s, encode)

    def _tokens_of(self, text: str, max_tokens: int, *, with_special: bool) -> Prompt:
        ids = self._tokenizer.encode(text, with_special=with_special, max_tokens=max_tokens)
        return Prompt(ids, max(ids, default=0))

    async def _read_ids(self, prompt: generation_service_pb2.TokenPrompt, limits: PromptLimits) -> Prompt:
        num_ids = len(prompt.token_ids)
        self._check_size(_TOKEN_ID_BYTES * num_ids)
        check_num_tokens(num_ids, limits.max_tokens)
        ids: list[int] = []
        largest = 0
        for start in range(0, num_ids, _SLICE_IDS):
            part = prompt.token_ids[start : start + _SLICE_IDS]
            ids += part
            largest = max(largest, *part)
            await asyncio.sleep(0)
        return Prompt(ids, largest)

    async def _render(self, chat: generation_service_pb2.ChatPrompt, limits: PromptLimits) -> str:
        num_messages = len(chat.messages)
        if not num_messages:
            raise InvalidRequestError("EMPTY_PROMPT", "the conversation has no messages")
        if num_messages > MAX_CHAT_MESSAGES:
            raise InvalidRequestError(
                "PROMPT_TOO_LONG",
                f"the conversation has {num_messages} messages; at most {MAX_CHAT_MESSAGES} are taken",
            )
        conversation = self._conversation(chat)
        texts = [text for _, *texts in conversation.messages for text in texts]
        texts += [*conversation.tools, conversation.variables]
        num_bytes = self._check_size(sum(len(text.encode()) for text in texts) + _MESSAGE_BYTES * num_messages)
        return await self._chat.render(conversation, num_bytes, limits.caller, deadline_s=limits.deadline_s)

    def _conversation(self, chat: generation_service_pb2.ChatPrompt) -> Conversation:
        for message in chat.messages:
            if message.role not in CHAT_ROLES:
                known = ", ".join(CHAT_ROLES)
                raise InvalidRequestError("BAD_REQUEST", f"role {message.role[:32]!r} must be one of {known}")
        if chat.continue_final_message and chat.add_generation_prompt:
            raise InvalidRequestError(
                "BAD_REQUEST", "`continue_final_message` goes on from a message, `add_generation_prompt` begins one"
            )
        return Conversation(
            messages=[(self._role(message.role), message.content, message.fields_json) for message in chat.messages],
            tools=list(chat.tools_json),
            variables=chat.variables_json,
            template=chat.template_name,
            add_generation_prompt=begins_answer(chat),
            continue_final_message=chat.continue_final_message,
        )

    def _role(self, role: str) -> str:
        return "system" if role == "developer" and not self._has_developer else role

    def _check_size(self, num_bytes: int) -> int:
        if num_bytes > self._max_bytes:
            raise InvalidRequestError(
                "PROMPT_TOO_LONG", f"the prompt has {num_bytes} bytes; this router takes {self._max_bytes}"
            )
        return num_bytes


def begins_answer(chat: generation_service_pb2.ChatPrompt) -> bool:
    """Return whether the template is to write what an answer begins with."""
    return chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not chat.continue_final_message
