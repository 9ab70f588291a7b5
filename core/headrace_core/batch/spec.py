"""What every worker checks before it takes a sequence: fail closed, at the door."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_core.errors import InvalidRequestError
from headrace_core.request import DEFAULT_MAX_TOKENS, SamplingParams, check_request_id, check_token_ids


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the model and its settings fix for every sequence."""

    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    grammar_problem: str = ""
    """Why no output can be held to a grammar; empty if it can."""


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """What to compute for one sample of one request.

    `token_ids` are the prompt, then the tokens that earlier attempts already produced.
    """

    request_id: str
    attempt: int
    sample_index: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    num_prompt_logprobs: int = 0
    """Tokens of the prompt, from its second on, whose log-probabilities are known already."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens that earlier attempts already produced."""
        return len(self.token_ids) - self.num_prompt_tokens

    def check_attempt(self) -> None:
        """Check what names the attempt: all of it where nothing is computed.

        Raises:
            InvalidRequestError: BAD_REQUEST.
        """
        check_request_id(self.request_id)
        if self.attempt < 1:
            raise InvalidRequestError("BAD_REQUEST", "attempt is 0; attempts count from 1")

    def check(self, limits: ModelLimits) -> None:
        """Check every field.

        Raises:
            InvalidRequestError: EMPTY_PROMPT, PROMPT_TOO_LONG, BAD_TOKEN, BAD_SAMPLING, BAD_REQUEST, BAD_GRAMMAR.
        """
        self.check_attempt()
        if not self.token_ids:
            raise InvalidRequestError("EMPTY_PROMPT", "token_ids is empty; send at least one")
        if not 1 <= self.num_prompt_tokens <= len(self.token_ids):
            raise InvalidRequestError(
                "BAD_REQUEST", f"num_prompt_tokens is {self.num_prompt_tokens}, of {len(self.token_ids)} token_ids"
            )
        if len(self.token_ids) >= limits.max_context_tokens:
            raise InvalidRequestError(
                "PROMPT_TOO_LONG",
                f"{len(self.token_ids)} tokens leave no room to generate in a context of {limits.max_context_tokens}",
            )
        if self.params.seed is None:
            raise InvalidRequestError("BAD_SAMPLING", "seed is unset; the router draws one")
        max_tokens = DEFAULT_MAX_TOKENS if self.params.max_tokens is None else self.params.max_tokens
        if self.num_output_tokens >= max_tokens:
            raise InvalidRequestError("BAD_REQUEST", f"all of max_tokens={max_tokens} tokens are produced already")
        if not 0 <= self.num_prompt_logprobs < self.num_prompt_tokens:
            problem = f"num_prompt_logprobs is {self.num_prompt_logprobs}, of {self.num_prompt_tokens} tokens"
            raise InvalidRequestError("BAD_REQUEST", problem)
        self.params.num_prompt_logprobs(self.num_prompt_tokens)
        check_token_ids(self.token_ids, limits.vocab_size, "token_ids")
        if self.params.grammar is not None and limits.grammar_problem:
            problem = f"this worker can't hold answers to a grammar: {limits.grammar_problem}"
            raise InvalidRequestError("BAD_GRAMMAR", problem)
        self.params.validate_tokens(limits.vocab_size, limits.eos_token_ids)
