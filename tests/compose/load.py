"""What is sent beside the clients whose every token is checked: one request for each thing to see."""

from __future__ import annotations

import asyncio
from typing import Any

from headrace_client import AsyncClient
from headrace_core.errors import InvalidRequestError
from headrace_core.request import SamplingParams

_STORY = "Once upon a time there was a little fox named {name}. "
_LONG = SamplingParams(temperature=0.0, max_tokens=720, ignore_eos=True)
_SHORT = SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)
_NAMES = ("Zorvim", "Lumira", "Tokka", "Berion", "Quill", "Nessa", "Ardo", "Mirabel", "Pip", "Solenne")
_MANY_PROMPT_BYTES = 5 << 20
"""More than the router's --max-prompt-bytes."""


async def errands(client: AsyncClient) -> None:
    """Send what the dashboards' rarer panels show: pages that run out, a conversation, a long prompt, a refusal."""
    await asyncio.gather(
        *(_outgrow(client, name) for name in _NAMES[:7]), *(_talk(client, name) for name in _NAMES[7:])
    )
    await client.generate(_STORY.format(name="Oona") * 120, _SHORT)
    try:
        await client.generate("a" * _MANY_PROMPT_BYTES, _SHORT)
    except InvalidRequestError:
        return
    raise AssertionError("a prompt larger than the router takes was taken")


async def long_prompts(client: AsyncClient) -> None:
    """Have prompts computed that take a while, each of its own, and more of them than are computed at a time."""
    prompts = (_STORY.format(name=name) * 120 for name in _NAMES)
    await asyncio.gather(*(client.generate(prompt, SamplingParams(max_tokens=4)) for prompt in prompts))


async def hand_offs(client: AsyncClient, count: int) -> list[Any]:
    """Return the timings of so many requests, each with a prompt of its own, one after the other."""
    found: list[Any] = []
    for number in range(count):
        prompt = f"{number}: " + _STORY.format(name=_NAMES[number % len(_NAMES)]) * (1 + number % 24)
        answer = await client.generate(prompt, SamplingParams(temperature=0.0, max_tokens=8), include_timings=True)
        found.append(answer.timings)
    return found


async def _outgrow(client: AsyncClient, name: str) -> None:
    """Ask for more than the output that the router keeps pages for."""
    await client.generate(_STORY.format(name=name), _LONG)


async def _talk(client: AsyncClient, name: str) -> None:
    """Go on from an answer: its pages are still where they were computed."""
    first = _STORY.format(name=name) * 8
    answer = await client.generate(first, _SHORT)
    await client.generate(f"{first}{answer.text} And then {first}", _SHORT)
