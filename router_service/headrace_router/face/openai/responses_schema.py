"""`POST /v1/responses`, as OpenAI's clients write it: one answer in text to a text or a conversation, nothing kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from headrace_router.face.openai.body import Body, Refused
from headrace_router.face.openai.schema import Count

_NOTHING = Annotated[list[Any], Field(max_length=0)]
_NOTHING_KEPT = "nothing is kept; send the whole conversation as `input`"
_NO_TOOLS = "tools are called by /v1/chat/completions"


class InputPart(Body):
    """A part of an item's content, what was asked or what was answered."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[_NOTHING | None, Refused("text only")] = None
    logprobs: Annotated[list[Any] | None, Refused("of answers alone")] = None


class InputItem(Body):
    """One message of a conversation; an item of an answer is one, too."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="as of messages")
    content: str | list[InputPart] = Field(description="a text, or parts of text, which are joined")
    type: Literal["message"] | None = Field(None, description="`message`")
    id: str | None = Field(None, description="taken, and used for nothing")
    status: str | None = Field(None, description="taken, and used for nothing")
    phase: Annotated[None, Refused("text only")] = None


class TextFormat(Body):
    """What the text is to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """How a text is to look."""

    format: TextFormat | None = Field(None, description="`text`, `json_object` or `json_schema`")
    verbosity: Annotated[None, Refused("the model's template is used as it is")] = None


class ResponsesRequest(Body):
    """`POST /v1/responses`."""

    model: str = Field("", description="as /v1/models names it; empty: the one served")
    input: str | list[InputItem] = Field(description="what a user says, or a conversation")
    instructions: str | None = Field(None, description="a system message before it")
    max_output_tokens: Count | None = Field(None, description="most tokens; default: what the context leaves")
    temperature: float | None = Field(None, description="0 is greedy; default 1")
    top_p: float | None = Field(None, description="nucleus mass; default 1")
    stream: bool | None = Field(None, description="answer in server-sent events, as tokens come")
    user: str | None = Field(None, description="taken, and used for nothing")
    store: bool | None = Field(None, description="taken; nothing is kept")
    text: TextOptions | None = Field(None, description="its `format`: `text`, `json_object` or `json_schema`")
    background: Annotated[Literal[False] | None, Refused(_NOTHING_KEPT)] = None
    previous_response_id: Annotated[None, Refused(_NOTHING_KEPT)] = None
    conversation: Annotated[None, Refused(_NOTHING_KEPT)] = None
    prompt: Annotated[None, Refused(_NOTHING_KEPT)] = None
    metadata: Annotated[None, Refused(_NOTHING_KEPT)] = None
    include: Annotated[_NOTHING | None, Refused("there is text alone")] = None
    tools: Annotated[_NOTHING | None, Refused(_NO_TOOLS)] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, Refused(_NO_TOOLS)] = None
    parallel_tool_calls: Annotated[bool | None, Refused(_NO_TOOLS)] = None
    max_tool_calls: Annotated[None, Refused(_NO_TOOLS)] = None
    reasoning: Annotated[None, Refused("the model's template is used as it is")] = None
    service_tier: str | None = Field(None, max_length=32, description="as of completions")
    truncation: Annotated[Literal["disabled"] | None, Refused("a prompt that is too long is refused")] = None
    top_logprobs: Annotated[Literal[0] | None, Refused("not served here yet")] = None
    stream_options: Annotated[None, Refused("there are none")] = None
