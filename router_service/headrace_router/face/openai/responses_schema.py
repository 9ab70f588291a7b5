"""`POST /v1/responses`, as OpenAI's clients write it: one answer to a text or a conversation, nothing kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, Tag

from headrace_router.face.openai.body import SAYS_ITSELF, Body, Refused
from headrace_router.face.openai.schema import CACHE, Count
from headrace_router.face.openai.tools import CHOICES, PARALLEL, Function, NamedFunction, NamedTool, Tool, Tooled

_NOTHING = Annotated[list[Any], Field(max_length=0)]
_NOTHING_KEPT = "nothing is kept; send the whole conversation as `input`"
_OWN_TOOLS = "functions are the clients' own: what is called is told"


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
    type: Literal["message"] | None = Field(
        None, description="`message` (default), `function_call`, `function_call_output` or `reasoning`"
    )
    id: str | None = Field(None, description="taken, and used for nothing")
    status: str | None = Field(None, description="taken, and used for nothing")
    phase: Annotated[None, Refused("text only")] = None


class ReasoningPart(Body):
    """A part of what was thought."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Body):
    """What the model thought before what follows."""

    type: Literal["reasoning"]
    content: list[ReasoningPart] | None = Field(None, description="thoughts, for templates that show them")
    summary: Annotated[_NOTHING | None, Refused("thoughts are told whole")] = None
    encrypted_content: Annotated[None, Refused(_NOTHING_KEPT)] = None
    id: str | None = None
    status: str | None = None


class FunctionCall(Body):
    """What the model called."""

    type: Literal["function_call"]
    call_id: str = Field(description="which call and which output belong together")
    name: str = Field(description="the function that was called")
    arguments: str = Field(description="a JSON object, as text, with which it was called")
    namespace: Annotated[None, Refused(_OWN_TOOLS)] = None
    caller: Annotated[None, Refused(_OWN_TOOLS)] = None
    id: str | None = None
    status: str | None = None


class FunctionCallOutput(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputPart] = Field(description="a text, or parts of text, which are joined, that a call gave")
    namespace: Annotated[None, Refused(_OWN_TOOLS)] = None
    caller: Annotated[None, Refused(_OWN_TOOLS)] = None
    name: str | None = None
    id: str | None = None
    status: str | None = None


_KINDS = {
    "message": "InputItem",
    "reasoning": "ReasoningItem",
    "function_call": "FunctionCall",
    "function_call_output": "FunctionCallOutput",
}


def _class_of(value: object) -> str | None:
    """Return by its `type` which class an item is of; a message may have none."""
    if not isinstance(value, dict):
        return None
    kind = cast("dict[str, object]", value).get("type")
    return "InputItem" if kind is None else _KINDS.get(kind) if isinstance(kind, str) else None


Item = Annotated[
    Annotated[InputItem, Tag("InputItem")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")]
    | Annotated[FunctionCall, Tag("FunctionCall")]
    | Annotated[FunctionCallOutput, Tag("FunctionCallOutput")],
    Discriminator(
        _class_of,
        custom_error_type=SAYS_ITSELF,
        custom_error_message=f"must be an object whose `type` is one of {', '.join(_KINDS)}",
    ),
]


Input = Annotated[
    Annotated[str, Tag("str")] | Annotated[list[Item], Tag("list[Item]")],
    Discriminator(lambda value: "str" if isinstance(value, str) else "list[Item]"),
]
"""Read as one or the other, so that what is wrong with an item is told of the item."""


class _OfFunction(Body):
    """Comes before what it says the type of."""

    type: Literal["function"]


class NamedFlat(NamedFunction, _OfFunction):
    """The one function that must be called."""


class FlatTool(Function, _OfFunction):
    """One function, as this endpoint's clients write it."""


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


class NoStreamOptions(Body):
    """What a stream may be told."""

    include_obfuscation: Annotated[Literal[False] | None, Refused("events are as long as their text is")] = None


class ResponsesRequest(Body):
    """`POST /v1/responses`."""

    model: str = Field("", description="as /v1/models names it; empty: the one served")
    input: Input = Field(description="what a user says, or a conversation's items")
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
    include: Annotated[_NOTHING | None, Refused("there is nothing to include")] = None
    tools: Annotated[list[FlatTool], Field(max_length=128)] | None = Field(
        None, description="functions, up to 128, which the template is told of; no tools of OpenAI's own"
    )
    tool_choice: Literal["none", "auto", "required"] | NamedFlat | None = Field(None, description=CHOICES)
    parallel_tool_calls: bool | None = Field(None, description=PARALLEL)
    max_tool_calls: Annotated[None, Refused(_OWN_TOOLS)] = None
    reasoning: Annotated[None, Refused("the model's template is used as it is")] = None
    service_tier: str | None = Field(None, max_length=32, description="as of completions")
    safety_identifier: str | None = Field(None, description="taken, and used for nothing")
    prompt_cache_key: str | None = Field(None, description="as of completions")
    prompt_cache_retention: Annotated[Literal["in_memory"] | None, Refused(CACHE)] = None
    prompt_cache_options: Annotated[None, Refused(CACHE)] = None
    moderation: Annotated[None, Refused("nothing is moderated; ask whatever does, before and after")] = None
    background_options: Annotated[None, Refused(_NOTHING_KEPT)] = None
    context_management: Annotated[None, Refused("what is told is not changed; shorten `input`")] = None
    access_programs: Annotated[None, Refused("there are none here")] = None
    image: Annotated[None, Refused("text only")] = None
    truncation: Annotated[Literal["disabled"] | None, Refused("a prompt that is too long is refused")] = None
    top_logprobs: Annotated[Literal[0] | None, Refused("not served here yet")] = None
    stream_options: NoStreamOptions | None = Field(None, description="its `include_obfuscation` may be false")

    def tooled(self) -> Tooled:
        """Return what it says of tools, as a conversation's body says it."""
        tools = [
            Tool(type="function", function=Function.model_validate(tool.model_dump(exclude={"type"})))
            for tool in self.tools or ()
        ]
        choice = self.tool_choice
        if isinstance(choice, NamedFlat):
            choice = NamedTool(type="function", function=NamedFunction(name=choice.name))
        return Tooled(tools=tools or None, tool_choice=choice, parallel_tool_calls=self.parallel_tool_calls)
