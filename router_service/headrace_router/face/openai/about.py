"""What every answer of one request says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_router.face.openai.parts import TokenBytes
from headrace_router.face.openai.request import Wanted


@dataclass(frozen=True, slots=True)
class About:
    """Known before the first token."""

    wanted: Wanted
    answer_id: str
    """`chatcmpl-`, `cmpl-` or `resp-`, and the request's id."""
    created_s: int
    """By the clock, in whole seconds since 1970."""
    model: str
    prompt_ids: list[int]
    prompt_text: str
    """Only if it is to be echoed."""
    token_bytes: TokenBytes
