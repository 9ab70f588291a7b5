"""From a client's message to a checked request: everything that can be refused is refused here, before it queues.

Checks that need only the message come first, then the tokenizer, then what depends on the fleet (vocabulary, context).
An explicit `max_tokens` past the context window is no error: the sample ends with LENGTH where the window does.
"""

from __future__ import annotations

import random
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from headrace.v1 import generation_service_pb2, types_pb2
from headrace_core.errors import InvalidRequestError, NotFoundError
from headrace_core.request import (
    MAX_REQUEST_ID_CHARS,
    MAX_SAMPLES,
    SamplingParams,
    check_request_id,
    check_token_ids,
)
from headrace_core.shares import Caller
from headrace_core.slo import NO_TARGETS, Targets

from headrace_router.fleet.registry import FleetModel
from headrace_router.requests.encoded_prompt import EncodedPrompt
from headrace_router.requests.sampling import Checked, Samplings
from headrace_router.requests.targets import targets_of
from headrace_router.text.prompts import Prompt, PromptLimits, Prompts
from headrace_router.text.tokenizer import check_num_tokens

_ID_BYTES = 12
_ids = random.Random(secrets.randbits(256))


@dataclass(slots=True)
class RequestSpec:
    """A request that can succeed, as far as the router can tell.

    Not mutated; not frozen, as all that is made once a request, because that costs a microsecond for a few fields.
    """

    request_id: str
    """The client's name for it, or ours if it gave none: for the client and for logs; others may use the same."""
    sent_id: str
    """Its name towards workers: of this request alone, whatever other clients and other routers call theirs."""
    prompt_ids: list[int]
    encoded_prompt: EncodedPrompt
    """The same, as workers get it."""
    params: SamplingParams
    """With `max_tokens` filled in; the seed is in `sampling` alone."""
    sampling: types_pb2.SamplingParams
    """For workers: `params` and the seed, without the stop strings, which are the router's business."""
    num_samples: int
    include_timings: bool
    is_continuation: bool
    """False for a conversation: its answer is a text of its own."""
    silent_ids: frozenset[int]
    """Ids that end a sample and have no text; shared with other requests."""
    special_stops: dict[int, str]
    """Those of them whose text is a stop string."""
    arrival_s: float
    tokenized_s: float
    deadline_s: float
    targets: Targets = NO_TARGETS
    """For its speed."""
    priority: int = 0
    """Among those of its client that wait: lower ones first."""
    shown_ids: frozenset[int] = frozenset()
    """Special tokens whose texts it has."""
    is_prompt_only: bool = False
    """Nothing is to be told but what is asked of the prompt: the one token that is made is nobody's."""
    num_prompt_logprobs: int = 0
    """Log-probabilities that are asked for of the prompt, in all."""

    @property
    def most_tokens(self) -> int:
        """Tokens that the request may come to, its prompt included."""
        assert self.params.max_tokens is not None, "filled in"
        return len(self.prompt_ids) + self.num_samples * self.params.max_tokens


@dataclass(slots=True)
class Asked:
    """What the message alone says, checked."""

    message: generation_service_pb2.GenerateRequest
    sampling: Checked
    seed: int
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
        self._samplings = Samplings(sampling, specials)
        self._prompts = prompts
        self._model_name = model_name

    def check(self, message: generation_service_pb2.GenerateRequest, key_class: str = "") -> Asked:
        """Check what the message alone says; its seed is taken out of it.

        Raises:
            InvalidRequestError: BAD_REQUEST, BAD_SAMPLING, BAD_GRAMMAR.
            NotFoundError: UNKNOWN_MODEL.
        """
        if message.request_id:
            check_request_id(message.request_id)
        self.check_model(message.model)
        if message.HasField("n") and not 1 <= message.n <= MAX_SAMPLES:
            raise InvalidRequestError("BAD_REQUEST", f"n is {message.n}; it must be 1 to {MAX_SAMPLES}", param="n")
        targets = targets_of(message, self._classes, key_class)
        sampling, seed = self._samplings.check(message.sampling)
        if message.n > 1 and sampling.params.prompt_logprobs is not None:
            raise InvalidRequestError("BAD_REQUEST", f"n is {message.n}; it must be 1 with prompt_logprobs", param="n")
        return Asked(message, sampling, secrets.randbits(63) if seed is None else seed, targets)

    def check_model(self, name: str) -> None:
        """Check that a model is the one that is served, or none is named.

        Raises:
            NotFoundError: UNKNOWN_MODEL.
        """
        if name and name != self._model_name:
            raise NotFoundError("UNKNOWN_MODEL", f"model {name[:80]!r} is not served; {self._model_name!r} is")

    def prompt_now(self, asked: Asked, model: FleetModel | None) -> Prompt | None:
        """Return the prompt if that takes no time to speak of; None: `prompt` must be waited for. Raises as that."""
        if asked.sampling.params.grammar is not None:
            return None
        return self._prompts.read_now(asked.message, _most_tokens(model))

    async def prompt(self, asked: Asked, model: FleetModel | None, caller: Caller, *, deadline_s: float) -> Prompt:
        """Return the prompt, unless it is too long for `model` (None: unknown). Callers take turns at what takes time.

        Raises:
            InvalidRequestError: BAD_REQUEST, BAD_GRAMMAR, EMPTY_PROMPT or PROMPT_TOO_LONG.
            DeadlineError: DEADLINE_EXCEEDED.
            UnavailableError: DRAINING.
        """
        if (grammar := asked.sampling.params.grammar) is not None:
            await self._prompts.check_grammar(grammar, caller, deadline_s=deadline_s)
        return await self._prompts.read(asked.message, PromptLimits(caller, deadline_s, _most_tokens(model)))

    async def prompt_ids(
        self,
        message: generation_service_pb2.GenerateRequest,
        model: FleetModel | None,
        caller: Caller,
        *,
        deadline_s: float,
    ) -> list[int]:
        """Return the tokens of a prompt; raises as `prompt` does."""
        limits = PromptLimits(caller, deadline_s, _most_tokens(model))
        return (await self._prompts.read(message, limits)).token_ids

    def admit(
        self,
        asked: Asked,
        prompt: Prompt,
        model: FleetModel,
        *,
        arrival_s: float,
        tokenized_s: float,
        deadline_s: float,
    ) -> RequestSpec:
        """Check against what the fleet serves and fill in what the client left to us.

        Raises:
            InvalidRequestError: PROMPT_TOO_LONG, BAD_TOKEN, BAD_SAMPLING or BAD_GRAMMAR.
        """
        message, num_prompt = asked.message, len(prompt.token_ids)
        check_num_tokens(num_prompt, model.max_context_tokens - 1)
        if not 0 <= prompt.largest_id < model.vocab_size:
            check_token_ids([prompt.largest_id], model.vocab_size, "prompt")
        params, num_samples = asked.sampling.params, message.n if message.HasField("n") else 1
        num_prompt_logprobs = params.num_prompt_logprobs(num_prompt)
        sampling = asked.sampling.settle(model, asked.seed, model.max_context_tokens - num_prompt)
        sent_id = _sent_id(message.request_id)
        return RequestSpec(
            request_id=message.request_id or sent_id,
            sent_id=sent_id,
            prompt_ids=prompt.token_ids,
            encoded_prompt=EncodedPrompt(prompt.token_ids),
            params=sampling.params,
            sampling=sampling.message,
            num_samples=num_samples,
            include_timings=message.include_timings,
            is_continuation=message.WhichOneof("input") != "chat" or message.chat.continue_final_message,
            silent_ids=sampling.silent_ids,
            special_stops=sampling.special_stops,
            arrival_s=arrival_s,
            tokenized_s=tokenized_s,
            deadline_s=deadline_s,
            targets=asked.targets,
            priority=message.priority,
            is_prompt_only=params.max_tokens == 0,
            num_prompt_logprobs=num_prompt_logprobs,
        )


def _most_tokens(model: FleetModel | None) -> int:
    """Return the most tokens that a prompt may have."""
    return model.max_context_tokens - 1 if model else sys.maxsize


def _sent_id(request_id: str) -> str:
    """Return a name that no other request has, here or at another router; it begins as the client's does, for logs.

    Workers know a sequence by this name and let a later attempt end an earlier one.
    """
    unique = f"{_ids.getrandbits(8 * _ID_BYTES):0{2 * _ID_BYTES}x}"
    if not request_id:
        return unique
    return f"{request_id[: MAX_REQUEST_ID_CHARS - len(unique) - 1]}-{unique}"
