"""What is asked: one request at a time, whichever way a server speaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

Prompt = list[int] | str
"""Token ids, or a text."""
OnTokens = Callable[[int], None]
"""Told of tokens when they come, and how many together."""


@dataclass(slots=True)
class Answered:
    """What a server said of its answer."""

    num_prompt: int = 0
    token_ids: list[int] = field(default_factory=list[int])
    """Empty where the server does not say."""
    num_output: int | None = None
    num_cached: int | None = None


class Target(Protocol):
    """A server under load. Event loop only."""

    async def ask(self, prompt: Prompt, num_output: int, on_tokens: OnTokens) -> Answered:
        """Ask to go on with a prompt for exactly `num_output` tokens; return when the answer is complete.

        Raises:
            HeadraceError: it was refused, or cut short.
        """
        ...

    async def close(self) -> None:
        """Disconnect."""
        ...
