"""What a caller asks of sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; docs/client.md says what each field means and may be.

    `temperature`, `top_p`, `top_k` and `repetition_penalty` None: as the model's generation_config.json says, else off
    (temperature 1). `max_tokens` None: the router's default, cut to what the context leaves. `seed` None: the router
    draws one. `top_logprobs` None: no log-probabilities; `prompt_logprobs` None: none of the prompt's tokens; with them
    `max_tokens` may be 0, and nothing is generated. `grammar` is one of `json_schema`, `regex` and `lark` with its
    text, as {"regex": "[0-9]+"}.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict[int, float])
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Mapping[str, str] | None = None
