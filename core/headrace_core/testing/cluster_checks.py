"""What tests of a running cluster share: the reference's tokens, and waiting until every page is free.

For tests; needs transformers, which the product does not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from headrace_core.testing.async_test import WAIT_S

_POLL_S = 0.02


class Reference:
    """transformers on a checkpoint, in float32: the oracle of every token."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._model = model.eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)

    def tokenize(self, text: str) -> list[int]:
        """Return the prompt's token ids, special tokens included."""
        return self._tokenizer(text).input_ids

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation, ready for the assistant's answer."""
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def greedy(self, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Return the greedy continuation; an end-of-sequence token is its last one."""
        ids = torch.tensor([list(prompt_token_ids)])
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens
            )
        return out[0, ids.shape[1] :].tolist()

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of output tokens without special ones."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


async def eventually(condition: Callable[[], Awaitable[Any]], *, what: str, timeout_s: float = WAIT_S) -> Any:
    """Return the first true answer of `condition`, asked again and again.

    Raises:
        AssertionError: there was none within `timeout_s`; names `what` and the last answer.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = await condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s; last answer {answer!r}"
        await asyncio.sleep(_POLL_S)


async def all_pages_free(server_info: Callable[[], Awaitable[Any]]) -> None:
    """Wait until no ready worker runs, queues or holds anything, and every page of its pool is free.

    Args:
        server_info: `AsyncClient.server_info`.
    """
    busy: list[Any] = []

    async def is_idle() -> bool:
        workers = [worker for worker in (await server_info()).workers if worker.state == "ready"]
        busy[:] = [
            worker
            for worker in workers
            if worker.num_running or worker.num_waiting or worker.num_leases or worker.num_free_pages < worker.num_pages
        ]
        return bool(workers) and not busy

    try:
        await eventually(is_idle, what="every page free")
    except AssertionError as error:
        raise AssertionError(f"{error}; busy: {busy}") from None
