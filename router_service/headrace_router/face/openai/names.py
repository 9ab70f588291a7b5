"""What fields are called by who sent them, where the router's own requests call them otherwise; errors are of those."""

from __future__ import annotations

from collections.abc import Mapping

from headrace_core.errors import HeadraceError

Names = Mapping[str, str]
"""By the name in `GenerateRequest`."""

COMPLETION_NAMES: Names = {"stop_strings": "stop", "slo_class": "service_tier", "top_logprobs": "logprobs"}
CHAT_NAMES: Names = {"stop_strings": "stop", "slo_class": "service_tier", "prompt": "messages"}
RESPONSE_NAMES: Names = {
    "slo_class": "service_tier", "prompt": "input", "max_tokens": "max_output_tokens", "grammar": "text.format",
}  # fmt: skip

_BY_REASON = {"EMPTY_PROMPT": "prompt", "PROMPT_TOO_LONG": "prompt", "BAD_GRAMMAR": "grammar", "UNKNOWN_MODEL": "model"}
"""Reasons that are about one field, whoever raises them."""


def name_field(error: HeadraceError, names: Names) -> None:
    """Let `error` name its field as the sender does, in its message as well; nothing changes the second time."""
    param = error.param or _BY_REASON.get(error.reason)
    if param is None:
        return
    name = error.param = names.get(param, param)
    text = str(error)
    if name != param and text.startswith(param):
        error.args = (name + text.removeprefix(param),)
