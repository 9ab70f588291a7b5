"""What OpenAI's clients may ask for, as they write it: every field, and of those that are not served which values pass.

A field is served, or its values are those that ask for nothing (`_neutral`); then anything else is refused by its name,
as is a field that is not here. Values are checked for their types here and for their ranges where gRPC's are
(`SamplingParams.validate`). `openapi.py` writes the table of docs/http.md from these classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from headrace_core.request import MAX_COUNT
from pydantic import Field

from headrace_router.face.openai.body import Body, Refused
from headrace_router.face.openai.messages import Message, Templated
from headrace_router.face.openai.structure import Structured
from headrace_router.face.openai.tools import Tooled

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]

_NO_FUNCTIONS = "send `tools` and `tool_choice`"
_TEXT_ONLY = "text only"
_WHOLE_PROMPT = "prompts are not changed; one that is too long is refused"
_AS_IT_IS = "the model's template and tokenizer are used as they are"
_BY_KWARGS = "a template that knows it takes it from `chat_template_kwargs`"
CACHE = "what is cached, and for how long, is the workers' own affair"
_NOTHING = Annotated[list[Any], Field(max_length=0)]


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool = Field(default=False, description="a last event with the counts of tokens")
    continuous_usage_stats: bool = Field(default=False, description="the counts so far in every event")
    include_obfuscation: Annotated[Literal[False] | None, Refused("events are as long as their text is")] = None


class _Generating(Structured):
    """What both endpoints have."""

    model: str = Field("", description="as /v1/models names it; empty: the one served")
    stream: bool | None = Field(None, description="answer in server-sent events, as tokens come")
    stream_options: StreamOptions | None = Field(None, description="only with `stream`")
    max_tokens: Count | None = Field(None, description="most tokens of each choice")
    temperature: float | None = Field(None, description="0 is greedy; default: the model's, else 1")
    top_p: float | None = Field(None, description="nucleus mass; default: the model's, else 1")
    n: Count | None = Field(None, description="choices, 1 to 16")
    seed: int | None = Field(None, ge=0, lt=1 << 64, description="the same seed gives the same choices")
    stop: str | list[str] | None = Field(
        None, description="a text that ends a choice and is no part of it, or up to 16"
    )
    presence_penalty: float | None = Field(None, description="-2 to 2")
    frequency_penalty: float | None = Field(None, description="-2 to 2")
    logit_bias: dict[str, float] | None = Field(
        None, description="an object of up to 1,024 token ids with -100 to 100 for each"
    )
    user: str | None = Field(None, description="taken, and used for nothing: a key says whose a request is")
    top_k: int | None = Field(
        None, ge=-1, le=MAX_COUNT, description="the most probable so many; 0 or -1: all; default: the model's, else all"
    )
    min_p: float | None = Field(None, description="drops what is less probable than this times the most probable")
    repetition_penalty: float | None = Field(None, description="0.01 to 100; default: the model's, else 1")
    min_tokens: Count | None = Field(None, description="tokens before an end may come")
    ignore_eos: bool | None = Field(None, description="goes on past the model's end of text")
    stop_token_ids: TokenIds | None = Field(None, description="tokens that end a choice")
    return_token_ids: bool | None = Field(None, description="`token_ids` in every choice, `prompt_token_ids` once")
    store: Annotated[Literal[False] | None, Refused("nothing is kept")] = None
    service_tier: str | None = Field(
        None,
        max_length=32,
        description="one of the router's `--slo-classes`; `auto` or `default`: the key's, if it has one",
    )
    slo_ttft_ms: Count | None = Field(
        None, description="most time until the first token; in place of the class's; 0: any"
    )
    slo_itl_ms: Count | None = Field(None, description="most time between two tokens, likewise")
    priority: int | None = Field(
        None,
        ge=-(1 << 31),
        lt=1 << 31,
        description="of one client's requests that wait lower ones start first; default 0",
    )
    metadata: Annotated[None, Refused("nothing is kept")] = None
    safety_identifier: str | None = Field(None, description="as `user`")
    prompt_cache_key: str | None = Field(
        None, description="taken, and used for nothing: what prompts begin with alike is found by itself"
    )
    prompt_cache_retention: Annotated[Literal["in_memory"] | None, Refused(CACHE)] = None
    prompt_cache_options: Annotated[None, Refused(CACHE)] = None
    cache_salt: Annotated[None, Refused("one cache serves all callers")] = None
    moderation: Annotated[None, Refused("nothing is moderated; ask whatever does, before and after")] = None
    request_id: Annotated[None, Refused("send it as the header `x-request-id`")] = None
    allowed_token_ids: Annotated[_NOTHING | None, Refused("send `logit_bias`, or a grammar")] = None
    bad_words: Annotated[_NOTHING | None, Refused("send `logit_bias`, or a grammar")] = None
    logprob_token_ids: Annotated[None, Refused("send `logprobs`: the most probable ones are told")] = None
    return_tokens_as_token_ids: Annotated[Literal[False] | None, Refused("send `return_token_ids`")] = None
    truncation_side: Annotated[None, Refused(_WHOLE_PROMPT)] = None
    kv_transfer_params: Annotated[None, Refused("the router says which worker sends to which")] = None
    use_beam_search: Annotated[Literal[False] | None, Refused("answers are sampled")] = None
    length_penalty: Annotated[Annotated[float, Field(ge=1, le=1)] | None, Refused("answers are sampled")] = None
    truncate_prompt_tokens: Annotated[None, Refused(_WHOLE_PROMPT)] = None
    skip_special_tokens: Annotated[Literal[True] | None, Refused("special tokens have no text")] = None
    spaces_between_special_tokens: Annotated[Literal[True] | None, Refused("special tokens have no text")] = None
    include_stop_str_in_output: Annotated[Literal[False] | None, Refused("a choice ends before it")] = None
    prompt_logprobs: Count | None = Field(
        None, description="of every prompt token but the first and of so many in its place, 0 to 20; not with `stream`"
    )


class CompletionRequest(_Generating):
    """`POST /v1/completions`."""

    prompt: Annotated[
        str
        | TokenIds
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[TokenIds], Field(fail_fast=True)]
        | None,
        Field(
            description="a text, a list of token ids, or a list of these, which has `n` choices for each, 128 in all"
        ),
    ] = None
    prompt_token_ids: TokenIds | None = Field(None, description="in place of `prompt`")
    echo: bool | None = Field(
        None, description="the prompt's text first, with `logprobs` theirs as well; `max_tokens` may be 0 then"
    )
    logprobs: Count | None = Field(None, description="of the chosen token and of so many most probable ones, 0 to 20")
    add_special_tokens: Annotated[Literal[True] | None, Refused(_AS_IT_IS)] = None
    best_of: Annotated[Literal[1] | None, Refused("all `n` choices are returned")] = None
    suffix: Annotated[Literal[""] | None, Refused("text is continued, not filled in")] = None
    prompt_embeds: Annotated[None, Refused("send `prompt`")] = None


class ChatRequest(_Generating, Templated, Tooled):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(description="at least one, at most 4,096")
    max_completion_tokens: Count | None = Field(
        None, description="`max_tokens`, as it is called now; one of the two, or both alike"
    )
    logprobs: bool | None = Field(None, description="of every chosen token")
    top_logprobs: Count | None = Field(None, description="and of so many most probable ones, 0 to 20; needs `logprobs`")
    functions: Annotated[_NOTHING | None, Refused(_NO_FUNCTIONS)] = None
    function_call: Annotated[Literal["none", "auto"] | None, Refused(_NO_FUNCTIONS)] = None
    modalities: Annotated[list[Literal["text"]] | None, Refused(_TEXT_ONLY)] = None
    audio: Annotated[None, Refused(_TEXT_ONLY)] = None
    prediction: Annotated[None, Refused("answers are not predicted")] = None
    reasoning_effort: Annotated[None, Refused(_BY_KWARGS)] = None
    verbosity: Annotated[None, Refused(_BY_KWARGS)] = None
    web_search_options: Annotated[None, Refused("nothing is searched")] = None
    include_reasoning: Annotated[Literal[True] | None, Refused("thoughts stand apart, in `reasoning_content`")] = None
    thinking_token_budget: Annotated[None, Refused(_BY_KWARGS)] = None
    mm_processor_kwargs: Annotated[None, Refused(_TEXT_ONLY)] = None
    media_io_kwargs: Annotated[None, Refused(_TEXT_ONLY)] = None
    add_special_tokens: Annotated[Literal[False] | None, Refused(_AS_IT_IS)] = None
    echo: Annotated[Literal[False] | None, Refused("answers only")] = None


class TokenizeRequest(Templated, Tooled):
    """`POST /tokenize`."""

    model: str = Field("", description="as /v1/models names it; empty: the one served")
    prompt: str | None = Field(None, description="a text, as /v1/completions takes it")
    messages: list[Message] | None = Field(None, description="or a conversation, as /v1/chat/completions takes it")
    add_special_tokens: Annotated[Literal[True] | None, Refused(_AS_IT_IS)] = None
    return_token_strs: Annotated[Literal[False] | None, Refused("ids only")] = None
    mm_processor_kwargs: Annotated[None, Refused(_TEXT_ONLY)] = None
