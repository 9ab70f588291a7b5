"""From the items of /v1/responses to the messages of a conversation, which templates know.

What a model did in one turn is several items and one message: its thoughts, its text and its calls.
"""

from __future__ import annotations

from headrace_router.face.http.errors import HttpError
from headrace_router.face.openai.messages import CalledFunction, Message, ToolCall, arguments_of
from headrace_router.face.openai.responses_schema import (
    FunctionCall,
    FunctionCallOutput,
    InputItem,
    InputPart,
    ReasoningItem,
    ResponsesRequest,
)


def messages_of(fields: ResponsesRequest) -> list[Message]:
    """Return a body's conversation.

    Raises:
        HttpError: names the item that can't be told.
    """
    messages: list[Message] = []
    if fields.instructions is not None:
        messages.append(Message.model_construct(role="system", content=fields.instructions))
    if isinstance(fields.input, str):
        return [*messages, Message.model_construct(role="user", content=fields.input)]
    called: set[str] = set()
    thought: str | None = None
    for index, item in enumerate(fields.input):
        match item:
            case ReasoningItem():
                thought = "".join(part.text for part in item.content or ())
                continue
            case InputItem():
                messages.append(Message.model_construct(role=item.role, content=_text(item.content)))
                if item.role == "assistant":
                    messages[-1].reasoning_content = thought
            case FunctionCall():
                arguments_of(item.arguments, f"input.{index}.arguments")
                called.add(item.call_id)
                _add_call(messages, item, thought)
            case FunctionCallOutput():
                if item.call_id not in called:
                    name = f"input.{index}.call_id"
                    problem = f"`{name}`: no `function_call` before it has it; send the whole conversation as `input`"
                    raise HttpError(problem, param=name)
                messages.append(
                    Message.model_construct(role="tool", content=_text(item.output), tool_call_id=item.call_id)
                )
        thought = None
    return messages


def _add_call(messages: list[Message], item: FunctionCall, thought: str | None) -> None:
    """Make a call part of the turn that it belongs to."""
    function = CalledFunction(name=item.name, arguments=item.arguments)
    call = ToolCall.model_construct(id=item.call_id, function=function)
    if not messages or messages[-1].role != "assistant" or thought is not None:
        messages.append(Message.model_construct(role="assistant", reasoning_content=thought, tool_calls=[call]))
    elif messages[-1].tool_calls is None:
        messages[-1].tool_calls = [call]
    else:
        messages[-1].tool_calls.append(call)


def _text(content: str | list[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
