"""What every answer of one request says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace_router.face.openai.parts import TokenBytes
from headrace_router.face.openai.request import Wanted
from headrace_router.face.openai.said import MakeReader


@dataclass(slots=True)
class About:
    """Known before the first token."""

    wanted: Wanted
    answer_id: str
    """`chatcmpl-`, `cmpl-` or `resp-`, and the request's id."""
    created_s: int
    """By the clock, in whole seconds since 1970."""
    model: str
    prompts: list[list[int]]
    """The tokens of each; every one has `num_samples` choices, those of the first come first."""
    prompt_texts: list[str]
    """Of each, empty unless they are to be echoed."""
    num_samples: int
    token_bytes: TokenBytes
    hides: Callable[[str], bool]
    """Whether a text is a special token, which answers do not show."""
    make_reader: MakeReader | None = None
    """What reads each choice's text; None: it is all content."""

    @property
    def num_choices(self) -> int:
        """Of all prompts."""
        return len(self.prompts) * self.num_samples

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.prompts))
