"""The requests of a cell, the answers that the model gives to them alone, and a client that can be watched."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from headrace_client import AsyncClient
from headrace_core.errors import HeadraceError
from headrace_core.request import SamplingParams

from tests.matrix.table import EXACT, LEFT

MAX_TOKENS = 12
PARAMS = SamplingParams(temperature=1.1, top_p=0.95, seed=5, max_tokens=MAX_TOKENS, ignore_eos=True, top_logprobs=2)
PROMPT = [(31 * i + 7) % 250 + 1 for i in range(301)]
"""Its pages are three frames, the last one of them a part of a page."""
OTHER_PROMPT = [(17 * i + 3) % 250 + 1 for i in range(290)]
"""Of the request that comes before where one must."""


async def alone(asked: Sequence[tuple[list[int], SamplingParams, int]]) -> list[list[list[int]]]:
    """Return the tokens of each sample of each (prompt, parameters, number of samples), computed one after the other.

    By one worker that does both, without a router and without a hand-off.
    """
    # Here: whoever only reads results needs no torch.
    from headrace_core.config import DecodeSettings
    from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
    from headrace_core.testing.mini_router import MiniRouter
    from headrace_core.testing.worker_pair import running
    from headrace_decode.service import DecodeService

    from tests.matrix.child import NUM_PAGES, PAGE_SIZE, VOCAB_SIZE

    loaded = loaded_fake_model(
        model=FakeModel(vocab_size=VOCAB_SIZE), num_pages=NUM_PAGES, page_size=PAGE_SIZE,
        max_context_tokens=1024, eos_token_ids=(257,),
    )  # fmt: skip
    worker = DecodeService(DecodeSettings(model=".", role="both", max_step_sequences=1), loader=lambda _: loaded)
    found: list[list[list[int]]] = []
    async with running(worker) as (address,), MiniRouter(decode=address) as router:
        for number, (prompt, params, num_samples) in enumerate(asked):
            found.append(
                [
                    await router.generate(f"r{number}", prompt, params=params, sample_index=index)
                    for index in range(num_samples)
                ]
            )
    return found


class Asking:
    """One request under way. Event loop only."""

    def __init__(
        self, client: AsyncClient, prompt: list[int], wanted: Sequence[int], *, timeout_s: float, name: str
    ) -> None:
        self.token_ids: list[int] = []
        self.timings: Any = None
        self._wanted = list(wanted)
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._changed = asyncio.Event()
        self._stream = client.stream(prompt, PARAMS, timeout_s=timeout_s, include_timings=True, request_id=name)
        self.outcome = asyncio.ensure_future(self._read())
        """How it ended: exact, left, the reason of an error, or what is wrong with it."""

    async def has_tokens(self, count: int) -> None:
        """Return when the client has so many, or the request is over."""
        while len(self.token_ids) < count and not self.outcome.done():
            self._changed.clear()
            await self._changed.wait()

    def read_no_more(self) -> None:
        """Read nothing until `read_on`."""
        self._may_read.clear()

    def read_on(self) -> None:
        """Read again."""
        self._may_read.set()

    def leave(self) -> None:
        """Go away."""
        self._stream.cancel()

    async def _read(self) -> str:
        is_finished = False
        try:
            async for delta in self._stream:
                self.token_ids += delta.token_ids
                self.timings = delta.timings or self.timings
                is_finished = is_finished or delta.finish_reason is not None
                self._changed.set()
                await self._may_read.wait()
        except HeadraceError as error:
            return self._judge(error.reason)
        finally:
            self._changed.set()
        return self._judge(EXACT if is_finished else LEFT)

    def _judge(self, end: str) -> str:
        """Return `end`, unless a token is wrong: what came must be how the answer begins, and all of it if it ended."""
        wanted = self._wanted if end == EXACT else self._wanted[: len(self.token_ids)]
        if self.token_ids != wanted:
            return f"wrong: {self.token_ids} in place of {wanted}, {end}"
        return end
