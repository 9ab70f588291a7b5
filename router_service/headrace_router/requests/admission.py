"""From a client's message to a checked request: everything that can be refused is refused here, before it queues.

Checks that need only the message come first, then the tokenizer, then what depends on the fleet (vocabulary, context).
An explicit `max_tokens` past the context window is no error: the sample ends with LENGTH where the window does.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.v1 import generation_service_pb2, types_pb2
from headrace_core.errors import InvalidRequestError, NotFoundError
from headrace_core.request import (
    DEFAULT_MAX_TOKENS,
    MAX_REQUEST_ID_CHARS,
    MAX_SAMPLES,
    SamplingParams,
    check_request_id,
    check_token_ids,
)
from headrace_core.shares import Caller
from headrace_core.slo import NO_TARGETS, Targets
from headrace_core.wire import decode_sampling, encode_sampling

from headrace_router.fleet.registry import FleetModel
from headrace_router.requests.encoded_prompt import EncodedPrompt
from headrace_router.requests.targets import targets_of
from headrace_router.text.prompts import Prompt, PromptLimits, Prompts
from headrace_router.text.tokenizer import check_num_tokens

_ID_BYTES = 12


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """A request that can succeed, as far as the router can tell."""

    request_id: str
    """The client's name for it, or ours if it gave none: for the client and for logs; others may use the same."""
    sent_id: str
    """Its name towards workers: of this request alone, whatever other clients and other routers call theirs."""
    prompt_ids: list[int]
    encoded_prompt: EncodedPrompt
    """The same, as workers get it."""
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
    special_stops: dict[int, str]
    """Those of them whose text is a stop string."""
    arrival_s: float
    tokenized_s: float
    deadline_s: float
    targets: Targets = NO_TARGETS
    """For its speed."""
    priority: int = 0
    """Among those of its client that wait: lower ones first."""

    @property
    def most_tokens(self) -> int:
        """Tokens that the request may come to, its prompt included."""
        assert self.params.max_tokens is not None, "filled in"
        return len(self.prompt_ids) + self.num_samples * self.params.max_tokens


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A request checked as far as it can be without knowing the fleet."""

    message: generation_service_pb2.GenerateRequest
    request_id: str
    sent_id: str
    params: SamplingParams
    prompt: Prompt
    arrival_s: float
    deadline_s: float
    tokenized_s: float
    targets: Targets


class Admission:
    """Checks and tokenizes. Event loop only."""

    def __init__(
        self,
        prompts: Prompts,
        *,
        model_name: str,
        specials: Mapping[str, int],
        sampling: SamplingParams,
        classes: Mapping[str, Targets],
    ) -> None:
        """Take what to check by.

        Args:
            prompts: read them.
            model_name: of the one model.
            specials: the model's special tokens, by text.
            sampling: for what requests leave open.
            classes: that requests may name, with their targets.
        """
        self._classes = classes
        self._sampling = sampling
        self._prompts = prompts
        self._model_name = model_name
        self._specials = specials

    async def tokenize(
        self,
        message: generation_service_pb2.GenerateRequest,
        model: FleetModel | None,
        caller: Caller,
        *,
        arrival_s: float,
        deadline_s: float,
        key_class: str = "",
    ) -> Tokenized:
        """Check what the message alone says, and tokenize its prompt unless it is too long for `model` (None: unknown).

        Callers take turns at what takes time.

        Raises:
            InvalidRequestError: BAD_REQUEST, BAD_SAMPLING, BAD_GRAMMAR, EMPTY_PROMPT or PROMPT_TOO_LONG.
            NotFoundError: UNKNOWN_MODEL.
            DeadlineError: DEADLINE_EXCEEDED.
            UnavailableError: DRAINING.
        """
        if message.request_id:
            check_request_id(message.request_id)
        self.check_model(message.model)
        if message.HasField("n") and not 1 <= message.n <= MAX_SAMPLES:
            raise InvalidRequestError("BAD_REQUEST", f"n is {message.n}; it must be 1 to {MAX_SAMPLES}")
        targets = targets_of(message, self._classes, key_class)
        params = decode_sampling(message.sampling, self._sampling)
        if params.grammar is not None:
            await self._prompts.check_grammar(params.grammar, caller, deadline_s=deadline_s)
        prompt = await self._read(message, model, caller, deadline_s=deadline_s)
        sent_id = _sent_id(message.request_id)
        return Tokenized(
            message=message,
            request_id=message.request_id or sent_id,
            sent_id=sent_id,
            params=params,
            prompt=prompt,
            arrival_s=arrival_s,
            deadline_s=deadline_s,
            tokenized_s=time.monotonic(),
            targets=targets,
        )

    def check_model(self, name: str) -> None:
        """Check that a model is the one that is served, or none is named.

        Raises:
            NotFoundError: UNKNOWN_MODEL.
        """
        if name and name != self._model_name:
            raise NotFoundError("UNKNOWN_MODEL", f"model {name[:80]!r} is not served; {self._model_name!r} is")

    async def prompt_ids(
        self,
        message: generation_service_pb2.GenerateRequest,
        model: FleetModel | None,
        caller: Caller,
        *,
        deadline_s: float,
    ) -> list[int]:
        """Return the tokens of a prompt; raises as `tokenize` does for one."""
        return (await self._read(message, model, caller, deadline_s=deadline_s)).token_ids

    async def _read(
        self,
        message: generation_service_pb2.GenerateRequest,
        model: FleetModel | None,
        caller: Caller,
        *,
        deadline_s: float,
    ) -> Prompt:
        max_tokens = model.max_context_tokens - 1 if model else sys.maxsize
        return await self._prompts.read(message, PromptLimits(caller, deadline_s, max_tokens))

    def admit(self, tokenized: Tokenized, model: FleetModel) -> RequestSpec:
        """Check against what the fleet serves and fill in what the client left to us.

        Raises:
            InvalidRequestError: PROMPT_TOO_LONG, BAD_TOKEN, BAD_SAMPLING or BAD_GRAMMAR.
        """
        message, params, num_prompt = tokenized.message, tokenized.params, len(tokenized.prompt.token_ids)
        check_num_tokens(num_prompt, model.max_context_tokens - 1)
        check_token_ids([tokenized.prompt.largest_id], model.vocab_size, "prompt")
        special_stops = self._special_stops(params.stop_strings, model.vocab_size)
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *special_stops))
        params.validate_tokens(model.vocab_size, model.eos_token_ids)
        if params.grammar is not None and model.without_grammars:
            raise InvalidRequestError(
                "BAD_GRAMMAR",
                f"the worker at {model.without_grammars} can't hold answers to a grammar; its log says why",
            )
        room = model.max_context_tokens - num_prompt
        max_tokens = min(params.max_tokens or DEFAULT_MAX_TOKENS, room)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        params = replace(params, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens), seed=seed)
        eos_ids = () if params.ignore_eos else model.eos_token_ids
        return RequestSpec(
            request_id=tokenized.request_id,
            sent_id=tokenized.sent_id,
            prompt_ids=tokenized.prompt.token_ids,
            encoded_prompt=EncodedPrompt(tokenized.prompt.token_ids),
            params=params,
            sampling=encode_sampling(replace(params, stop_strings=())),
            num_samples=message.n if message.HasField("n") else 1,
            include_timings=message.include_timings,
            is_continuation=message.WhichOneof("input") != "chat" or message.chat.continue_final_message,
            silent_ids=frozenset((*params.stop_token_ids, *eos_ids)),
            special_stops=special_stops,
            arrival_s=tokenized.arrival_s,
            tokenized_s=tokenized.tokenized_s,
            deadline_s=tokenized.deadline_s,
            targets=tokenized.targets,
            priority=message.priority,
        )

    def _special_stops(self, stop_strings: Sequence[str], vocab_size: int) -> dict[int, str]:
        """Return which of these are special tokens' texts, by token: answers have no text of theirs to look in."""
        found: dict[int, str] = {}
        for text in stop_strings:
            for special, token_id in self._specials.items():
                if special == text and token_id < vocab_size:
                    found[token_id] = text
                elif special in text and special != text:
                    raise InvalidRequestError(
                        "BAD_SAMPLING",
                        f"stop_strings: {text[:32]!r} has the special token {special[:32]!r} in it, which answers do "
                        "not show, so it would never be found; name the token alone",
                    )
        return found


def _sent_id(request_id: str) -> str:
    """Return a name that no other request has, here or at another router; it begins as the client's does, for logs.

    Workers know a sequence by this name and let a later attempt end an earlier one.
    """
    unique = secrets.token_hex(_ID_BYTES)
    if not request_id:
        return unique
    return f"{request_id[: MAX_REQUEST_ID_CHARS - len(unique) - 1]}-{unique}"
