"""What callers pass, as values that the wire takes: what is meant is taken, everything else is refused by name.

So a text stands for a list of one stop string, an array for a list of token ids, a mapping with `role` and `content`
for a `ChatMessage`, and None for what is left out; bytes are no token ids, and "0.7" is no number.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, NoReturn, TypeVar, cast

from headrace_core.errors import InvalidRequestError
from headrace_core.request import MAX_COUNT, Grammar, GrammarKind, SamplingParams

from headrace_client.results import ChatMessage
from headrace_client.sampling import SamplingParams as AskedParams
from headrace_client.service_level import ServiceLevel

_MAX_SHOWN = 60
_MOST_TIMEOUT_S = 1e9
"""Thirty years: longer ones are the same, and gRPC can't tell all of them."""
T = TypeVar("T")


def prompt_of(prompt: object) -> str | list[int] | list[ChatMessage]:
    """Return text, token ids or messages, none of them empty.

    Raises:
        InvalidRequestError: EMPTY_PROMPT; BAD_REQUEST, it is none of these.
    """
    if isinstance(prompt, str):
        return prompt or _refuse_empty()
    if isinstance(prompt, bytes | bytearray | memoryview):
        _refuse("the prompt", prompt, "text, token ids or messages; bytes become text by .decode()")
    if isinstance(prompt, Mapping | ChatMessage) or not isinstance(prompt, Iterable):
        _refuse("the prompt", prompt, "text, a list of token ids or a list of messages")
    parts = _items(cast("Iterable[object]", prompt))
    if not parts:
        _refuse_empty()
    if isinstance(parts[0], ChatMessage | Mapping):
        return [_message(f"part {index} of the prompt", part) for index, part in enumerate(parts)]
    if isinstance(parts[0], str):
        _refuse("part 0 of the prompt", parts[0], "a token id or a message; each of several texts is its own request")
    if all(type(part) is int for part in parts):
        return cast("list[int]", parts)
    return [whole(f"part {index} of the prompt", part, "a token id") for index, part in enumerate(parts)]


def sampling_of(sampling: object) -> tuple[SamplingParams, tuple[str, ...]]:
    """Return sampling parameters whose fields have the types that `SamplingParams` declares, and what is the model's.

    The latter are the names of fields that were left to the model's own defaults.

    Raises:
        InvalidRequestError: BAD_SAMPLING, a field is of no such type.
    """
    if sampling is None:
        return _DEFAULTS, OF_THE_MODEL
    if not isinstance(sampling, SamplingParams | AskedParams):
        _refuse("sampling", sampling, "SamplingParams", "BAD_SAMPLING")
    changed: dict[str, Any] = {}
    for field in fields(SamplingParams):
        value = getattr(sampling, field.name)
        if value is not None:
            changed[field.name] = _FIELDS[field.name](field.name, value)
        elif field.name not in ("max_tokens", "seed", "top_logprobs", "prompt_logprobs", "grammar"):
            changed[field.name] = getattr(_DEFAULTS, field.name)
    left = tuple(name for name in OF_THE_MODEL if getattr(sampling, name) is None)
    return replace(_DEFAULTS, **changed), left


def service_level_of(level: object) -> ServiceLevel:
    """Return targets that the wire takes, whatever their types.

    Raises:
        InvalidRequestError: BAD_REQUEST.
    """
    if level is None:
        return ServiceLevel()
    if not isinstance(level, ServiceLevel):
        _refuse("service_level", level, "a ServiceLevel")
    return ServiceLevel(
        text_of("slo_class", level.slo_class),
        _ms("ttft_ms", level.ttft_ms),
        _ms("itl_ms", level.itl_ms),
        _priority(level.priority),
    )


def text_of(name: str, value: object) -> str:
    """Return `value`, which is text, or None for an empty one.

    Raises:
        InvalidRequestError: BAD_REQUEST.
    """
    return value if isinstance(value, str) else "" if value is None else _refuse(name, value, "text")


def whole(name: str, value: object, expected: str = "a whole number", reason: str = "BAD_REQUEST") -> int:
    """Return a whole number, of whatever type; True and 1.0 are none.

    Raises:
        InvalidRequestError: `reason`.
    """
    try:
        return _refuse(name, value, expected, reason) if _is_truth(value) else operator.index(cast("Any", value))
    except TypeError:
        _refuse(name, value, expected, reason)


def timeout_of(value: object) -> float | None:
    """Return a number of seconds, or None for no limit.

    Raises:
        InvalidRequestError: BAD_REQUEST, it is no number of seconds from 0 on.
    """
    if value is None:
        return None
    timeout_s = _number("timeout_s", value, "BAD_REQUEST")
    if not timeout_s >= 0:
        _refuse("timeout_s", value, "a number of seconds from 0 on")
    return min(timeout_s, _MOST_TIMEOUT_S)


def _ms(name: str, value: object) -> int | None:
    if value is None:
        return None
    expected = f"whole milliseconds, 0 to {MAX_COUNT}"
    count = whole(name, value, expected)
    return count if 0 <= count <= MAX_COUNT else _refuse(name, value, expected)


def _priority(value: object) -> int:
    expected = f"a whole number, {-MAX_COUNT - 1} to {MAX_COUNT}"
    count = whole("priority", value, expected)
    return count if -MAX_COUNT - 1 <= count <= MAX_COUNT else _refuse("priority", value, expected)


def _items(values: Iterable[object]) -> list[object]:
    to_list: Callable[[], object] | None = getattr(values, "tolist", None)  # arrays of numpy, torch and the library
    items = list(values) if to_list is None else to_list()
    return cast("list[object]", items) if isinstance(items, list) else [items]


def _message(name: str, part: object) -> ChatMessage:
    values = cast("Mapping[object, object]", part) if isinstance(part, Mapping) else {}
    message = part if isinstance(part, ChatMessage) else None
    role: object = values.get("role") if message is None else message.role
    content: object = values.get("content") if message is None else message.content
    if not isinstance(role, str) or not isinstance(content, str):
        _refuse(name, part, "a message with a role and a content that are text")
    more = sorted(str(key) for key in values if key not in ("role", "content"))
    if more:
        _refuse(name, part, f"a message of role and content alone, without {', '.join(more)[:_MAX_SHOWN]}")
    return ChatMessage(role, content)


def _number(name: str, value: object, reason: str = "BAD_SAMPLING") -> float:
    try:
        if _is_truth(value) or isinstance(value, str | bytes):
            _refuse(name, value, "a number", reason)
        return float(cast("Any", value))
    except (TypeError, ValueError):
        _refuse(name, value, "a number", reason)
    except OverflowError:
        return math.inf if cast("int", value) > 0 else -math.inf


def _count(name: str, value: object) -> int:
    return whole(name, value, reason="BAD_SAMPLING")


def _flag(name: str, value: object) -> bool:
    return bool(value) if _is_truth(value) else _refuse(name, value, "true or false", "BAD_SAMPLING")


def _is_truth(value: object) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy's is no bool


def _ids(name: str, value: object) -> tuple[int, ...]:
    expected = "token ids"
    if isinstance(value, str | bytes | Mapping):
        _refuse(name, value, expected, "BAD_SAMPLING")
    items = _items(cast("Iterable[object]", value)) if isinstance(value, Iterable) else [value]
    return tuple(whole(name, item, expected, "BAD_SAMPLING") for item in items)


def _texts(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping):
        _refuse(name, value, "text, or a list of texts", "BAD_SAMPLING")
    items = list(cast("Iterable[object]", value))
    return tuple(item if isinstance(item, str) else _refuse(name, item, "texts", "BAD_SAMPLING") for item in items)


def _biases(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        _refuse(name, value, "a mapping of token ids to numbers", "BAD_SAMPLING")
    pairs = cast("Mapping[object, object]", value).items()
    return {
        whole(name, token_id, "by token ids", "BAD_SAMPLING"): _number(f"{name}[{token_id}]", bias)
        for token_id, bias in pairs
    }


def _grammar(name: str, value: object) -> Grammar:
    if isinstance(value, Grammar):
        return value
    kinds = [kind.value for kind in GrammarKind]
    expected = f"one of {', '.join(kinds)} with its text"
    if not isinstance(value, Mapping) or len(cast("Mapping[object, object]", value)) != 1:
        _refuse(name, value, expected, "BAD_SAMPLING")
    ((kind, text),) = cast("Mapping[object, object]", value).items()
    if kind not in kinds or not isinstance(text, str):
        _refuse(name, value, expected, "BAD_SAMPLING")
    return Grammar(GrammarKind(kind), text)


_DEFAULTS = SamplingParams()
OF_THE_MODEL = ("temperature", "top_p", "top_k", "repetition_penalty")
"""What generation_config.json may say; not sent where the caller does not say it."""
_FIELDS: dict[str, Callable[[str, object], Any]] = {
    "max_tokens": _count,
    "temperature": _number,
    "top_p": _number,
    "top_k": _count,
    "min_p": _number,
    "repetition_penalty": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "seed": _count,
    "min_tokens": _count,
    "ignore_eos": _flag,
    "stop_token_ids": _ids,
    "stop_strings": _texts,
    "logit_bias": _biases,
    "top_logprobs": _count,
    "prompt_logprobs": _count,
    "grammar": _grammar,
}


def _refuse(name: str, value: object, expected: str, reason: str = "BAD_REQUEST") -> NoReturn:
    shown = reprlib.repr(value)[:_MAX_SHOWN]
    raise InvalidRequestError(reason, f"{name} is {shown}, of type {type(value).__name__}; it must be {expected}")


def _refuse_empty() -> NoReturn:
    raise InvalidRequestError("EMPTY_PROMPT", "the prompt is empty")
