"""What a client asks for and what comes back, as every process sees it: plain values, no torch, no protobuf."""

from __future__ import annotations

import hashlib
import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from headrace_core.errors import InvalidRequestError

MOST_TIMEOUT_S = 7 * 86_400.0
"""Longest time of a request: one that brings more, or for ever, has so much. Clocks and timers can't count to all that
gRPC can say, which is 11,000 years."""
MAX_COUNT = (1 << 31) - 1
"""Ids and counts are int32 wherever they are computed with."""
MAX_EOS_TOKEN_IDS = 1024
"""Most tokens of a model that end a text."""
MAX_TOP_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 1 << 18
"""Most log-probabilities of one prompt, those of all its tokens' places together: 8,192 tokens with 20 each fit."""
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_SAMPLES = 16
MAX_GRAMMAR_BYTES = 64 << 10
DEFAULT_MAX_TOKENS = 256

MAX_ENTRIES = {"stop_token_ids": 1024, "logit_bias": 1024, "stop_strings": MAX_STOP_STRINGS}
"""Most entries of each list of `SamplingParams`: a step may do work for each, and everybody in it waits."""

FLOAT_RANGES = {
    "temperature": (0.0, 1e6),
    "top_p": (1e-30, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
"""What each may be, ends included: all that has an answer in float32, for any logits that a sound model gives."""
MAX_LOGIT_BIAS = 100.0

_TOKEN_ID_BYTES = 4
MAX_REQUEST_ID_CHARS = 64
_REQUEST_ID = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_REQUEST_ID_CHARS}}}")


class FinishReason(Enum):
    """Why a sequence stopped."""

    STOP = "stop"
    LENGTH = "length"


class GrammarKind(Enum):
    """How a grammar is written; the wire's names."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output may be; `types.proto` says more."""

    kind: GrammarKind
    text: str

    def validate(self) -> None:
        """Check its size, which whoever reads it relies on.

        Raises:
            InvalidRequestError: BAD_GRAMMAR.
        """
        num_bytes = len(self.text.encode())
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise InvalidRequestError(
                "BAD_GRAMMAR", f"the grammar has {num_bytes} bytes; at most {MAX_GRAMMAR_BYTES} are taken"
            )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `types.proto` says what each field means and may be; defaults are the wire's.

    `max_tokens` None means: the default, cut to what the context leaves. `seed` None means: the router draws one.
    `top_logprobs` and `prompt_logprobs` None mean: no log-probabilities. `max_tokens` is 0 only with the latter.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict[int, float])
    top_logprobs: int | None = None
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """True if the most probable token is always chosen."""
        return self.temperature == 0.0 or self.top_k == 1

    def validate(self) -> None:
        """Check every field against its range.

        Raises:
            InvalidRequestError: BAD_SAMPLING, naming the field, its value and its range; BAD_GRAMMAR.
        """
        for name, (low, high) in FLOAT_RANGES.items():
            value: float = getattr(self, name)
            _require(low <= value <= high, name, value, f"in [{low:g}, {high:g}]")  # which no NaN is
        for name in MAX_ENTRIES:
            check_num_entries(name, len(getattr(self, name)))
        max_tokens, is_default = (DEFAULT_MAX_TOKENS, True) if self.max_tokens is None else (self.max_tokens, False)
        if self.prompt_logprobs is None:  # with them the prompt may be all that is looked at
            _require(max_tokens >= 1, "max_tokens", max_tokens, "at least 1, or 0 with prompt_logprobs")
        most = f"{max_tokens}], max_tokens{' if it is not set' if is_default else ''}"
        _require(0 <= self.min_tokens <= max_tokens, "min_tokens", self.min_tokens, f"in [0, {most}")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(self.seed is None or 0 <= self.seed < 1 << 64, "seed", self.seed, "in [0, 2^64)")
        for text in self.stop_strings:
            is_fit = 1 <= len(text) <= MAX_STOP_STRING_CHARS
            _require(is_fit, "stop_strings", text[:32], f"1 to {MAX_STOP_STRING_CHARS} characters each")
        for token_id, bias in self.logit_bias.items():
            is_fit = -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS
            _require(is_fit, f"logit_bias[{token_id}]", bias, f"in [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]")
        for name, count in (("top_logprobs", self.top_logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _require(count is None or 0 <= count <= MAX_TOP_LOGPROBS, name, count, f"in [0, {MAX_TOP_LOGPROBS}]")
        if self.grammar is not None:  # which says itself where the output ends
            _require(not self.ignore_eos, "ignore_eos", self.ignore_eos, "false with a grammar")
            _require(not self.min_tokens, "min_tokens", self.min_tokens, "0 with a grammar")
            self.grammar.validate()

    def num_prompt_logprobs(self, num_prompt_tokens: int) -> int:
        """Return how many log-probabilities are wanted of a prompt, all in all.

        Raises:
            InvalidRequestError: BAD_SAMPLING, they are too many.
        """
        if self.prompt_logprobs is None:
            return 0
        count = (num_prompt_tokens - 1) * (1 + self.prompt_logprobs)
        fit = f"so small that {num_prompt_tokens} tokens have {MAX_PROMPT_LOGPROBS} log-probabilities at most"
        _require(count <= MAX_PROMPT_LOGPROBS, "prompt_logprobs", self.prompt_logprobs, fit)
        return count

    def validate_tokens(self, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Check the token ids it names against the model's vocabulary, and that they leave a token to choose.

        Raises:
            InvalidRequestError: BAD_TOKEN; BAD_SAMPLING, `min_tokens` forbids every token.
        """
        check_token_ids(self.stop_token_ids, vocab_size, "stop_token_ids")
        check_token_ids(self.logit_bias, vocab_size, "logit_bias")
        if self.min_tokens and len({*self.stop_token_ids, *eos_token_ids}) >= vocab_size:
            raise InvalidRequestError(
                "BAD_SAMPLING",
                f"min_tokens is {self.min_tokens}, but stop_token_ids and the model's end-of-sequence tokens, which it "
                f"forbids, are the whole vocabulary of {vocab_size} tokens; name fewer stop_token_ids",
                param="min_tokens",
            )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position; `top` is [(token id, logprob)], most probable first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Natural log-probabilities of consecutive tokens of a prompt, the first of them at position `first`, in columns.

    Of each: its own, its rank (1: none is more probable), and the `num_top` most probable tokens in its place, most
    probable first, one place's behind another's.
    """

    first: int
    logprobs: Sequence[float]
    ranks: Sequence[int]
    num_top: int
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]

    def parts(self, most_tokens: int) -> Iterator[PromptLogprobs]:
        """Yield it in parts of at most so many tokens."""
        for start in range(0, len(self.logprobs), most_tokens):
            end = start + most_tokens
            tops = slice(start * self.num_top, end * self.num_top)
            yield PromptLogprobs(
                self.first + start,
                self.logprobs[start:end],
                self.ranks[start:end],
                self.num_top,
                self.top_ids[tops],
                self.top_logprobs[tops],
            )


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One generated token."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def check_request_id(request_id: str) -> None:
    """Check that `request_id` is 1 to 64 characters of [A-Za-z0-9_-].

    Raises:
        InvalidRequestError: BAD_REQUEST.
    """
    if not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequestError(
            "BAD_REQUEST",
            f"request_id {request_id[:80]!r} must be 1 to 64 characters of [A-Za-z0-9_-]",
        )


def check_token_ids(token_ids: Iterable[int], vocab_size: int, name: str) -> None:
    """Check that every id of the iterable lies in the vocabulary.

    Raises:
        InvalidRequestError: BAD_TOKEN.
    """
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                "BAD_TOKEN", f"{name}: {token_id} is outside the vocabulary of {vocab_size} tokens", param=name
            )


def check_num_entries(name: str, count: int) -> None:
    """Check the length of the list `name` of `SamplingParams`.

    Raises:
        InvalidRequestError: BAD_SAMPLING.
    """
    _require(count <= MAX_ENTRIES[name], name, f"{count} entries long", f"at most {MAX_ENTRIES[name]}")


def hash_tokens(token_ids: Sequence[int]) -> bytes:
    """Return `Handoff.tokens_sha256` of these ids: SHA-256 over each as 4 bytes, unsigned and little-endian.

    Clients choose token ids, so the hash must be one that nobody can collide on purpose. 0.03 ms for 1,000 ids.

    Raises:
        OverflowError: an id is not in [0, 2^32).
    """
    return hashlib.sha256(token_words(token_ids)).digest()


def token_words(token_ids: Sequence[int]) -> array[int]:
    """Return what `hash_tokens` hashes: each id as 4 bytes, unsigned and little-endian.

    Raises:
        OverflowError: an id is not in [0, 2^32).
    """
    words = array("I", token_ids)
    assert words.itemsize == _TOKEN_ID_BYTES, "a C unsigned int has 4 bytes"
    if sys.byteorder == "big":
        words.byteswap()
    return words


def _require(is_met: bool, name: str, value: object, range_text: str) -> None:
    if not is_met:
        problem = f"{name} is {value}; it must be {range_text}"
        raise InvalidRequestError("BAD_SAMPLING", problem, param=name.partition("[")[0])
