"""What goes into a client and what comes out: plain, frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace_core.request import FinishReason


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Text (the tokenizer adds its special tokens), token ids (used as they are), or a conversation (rendered by the
model's chat template)."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one sample. `num_cached_tokens` of the prompt's tokens were found in a prefix cache."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a sample's time; docs/metrics.md says what each name covers."""

    name: str
    duration_us: int
    is_before_first_token: bool


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one sample's time went, from its arrival at the router.

    The phases are in order, without gaps, and sum to `total_us`; those before the first token sum to `ttft_us`.
    `prefill_worker` is empty when one worker did both. `transport` is empty when nothing was handed off. For
    `hidden_transfer_us` pages moved while their prompt was computed, `hidden_transfer_bytes` of them: in no sum.
    """

    phases: tuple[Phase, ...]
    total_us: int
    ttft_us: int
    transfer_bytes: int
    num_transfer_pages: int
    transport: str
    num_attempts: int
    prefill_worker: str
    decode_worker: str
    hidden_transfer_us: int = 0
    hidden_transfer_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position; `top` is [(token id, logprob)], most probable first.

    `token`, and `top_tokens` for each of `top`, are what these tokens stand for, alone. Bytes: a character may be made
    of several tokens. Empty where the router does not say.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    token: bytes = b""
    top_tokens: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptTokenLogprobs:
    """Log-probabilities in the place of one token of a prompt: `TokenLogprobs`, the token's id, and its rank.

    One more than there are tokens more probable than it.
    """

    token_id: int
    rank: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of one sample.

    `text` may be empty while a character or a possible stop string is incomplete. `logprobs` has one entry for each of
    `token_ids` when asked for, else it is empty. The last delta of a sample has `finish_reason` and `usage`, and
    `timings` when asked for. `matched_stop_string` is empty unless one ended the sample. `request_id` is the router's
    when the caller gave none. `prompt_logprobs`, when asked for, are of prompt tokens behind those of the delta before,
    from the second on; all of them come before the first token.
    """

    request_id: str
    sample_index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    matched_stop_string: str = ""
    prompt_logprobs: tuple[PromptTokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished sample. `logprobs` is empty unless asked for, and then as long as `token_ids`.

    `prompt_logprobs`, when asked for, are of the prompt's tokens but its first, of which nothing is known.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] = ()
    timings: Timings | None = None
    matched_stop_string: str = ""
    prompt_logprobs: tuple[PromptTokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished request. The properties are those of its first sample, for requests that ask for one."""

    request_id: str
    samples: tuple[Sample, ...]

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Output tokens of the first sample."""
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sample stopped."""
        return self.samples[0].finish_reason

    @property
    def usage(self) -> Usage:
        """Counts of the first sample."""
        return self.samples[0].usage

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of the first sample's tokens; empty unless asked for."""
        return self.samples[0].logprobs

    @property
    def prompt_logprobs(self) -> tuple[PromptTokenLogprobs, ...]:
        """Log-probabilities of the prompt's tokens but its first; empty unless asked for."""
        return self.samples[0].prompt_logprobs

    @property
    def timings(self) -> Timings | None:
        """Where the first sample's time went; None unless asked for."""
        return self.samples[0].timings


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker, as the router sees it.

    `role` is `prefill`, `decode`, `both`, or empty until the worker answered. `state` is `ready`, `draining`,
    `unreachable`, `starting` or `refused`; `detail` says why it is not ready. `transports` are best first.
    `transport_in_use` moved the pages of the last sequence handed to it, at `transfer_bytes_per_s`; empty and 0 if none
    was.
    """

    address: str
    role: str
    state: str
    detail: str
    num_pages: int
    num_free_pages: int
    num_running: int
    num_waiting: int
    num_leases: int
    transports: tuple[str, ...]
    transport_in_use: str
    transfer_bytes_per_s: int
    metrics_port: int = 0
    circuit: str = "closed"
    """`open` or `half-open` while it gets nothing new, or one sequence at a time, since it failed again and again."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a router serves. Fingerprint and context length are empty and 0 until a worker is ready.

    `metrics_port`, here and of a worker, is where its host serves Prometheus metrics; 0 if it does not say.
    """

    model_name: str
    model_fingerprint: str
    max_context_tokens: int
    workers: tuple[Worker, ...]
    num_queued: int
    num_running: int
    version: str
    metrics_port: int = 0
    default_sampling: Mapping[str, float] = field(default_factory=dict[str, float])
    """What a request gets that does not say it, by field: the model's own, where the router reads it."""
