"""A worker as far as it matters for bits: a model over pages of its own, and pages that come from another worker."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from headrace_core.batch.step import Chunk
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.model import Model
from torch import Tensor


class Holder:
    """`pages[i]` are those of sequence i, of `lengths[i]` tokens at most; in random order if there are `dice`."""

    def __init__(
        self, model: Model, page_size: int, lengths: Sequence[int], num_threads: int, dice: random.Random | None
    ) -> None:
        counts = [-(-length // page_size) for length in lengths]
        order = list(range(sum(counts)))
        if dice is not None:
            dice.shuffle(order)
        self.pages = [[order.pop() for _ in range(count)] for count in counts]
        self._model, self._num_threads, self._page_size = model, num_threads, page_size
        self._cache = KvCache(model.kv_layout(page_size), sum(counts), "cpu")

    def step(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Compute these chunks together; return the logits of all tokens of each."""
        torch.set_num_threads(self._num_threads)
        return self._model.all_logits(chunks, self._cache)

    def take(self, sequence: int, source: Holder, num_tokens: int) -> None:
        """Take over a sequence that has `num_tokens`: the bytes of its pages, as a hand-off moves them."""
        count = -(-num_tokens // self._page_size)
        pairs = list(zip(self.pages[sequence], source.pages[sequence], strict=True))[:count]
        for layer in range(len(self._cache.layers)):
            for mine, other in pairs:
                self._cache.page_bytes(layer, mine)[:] = source._cache.page_bytes(layer, other)

    def rows(self, sequence: int, count: int) -> list[Tensor]:
        """Return the cached rows of a sequence's tokens, by layer, in their order."""
        token_axis = 1 if self._cache.layers[0].ndim == 3 else 2
        pages = self.pages[sequence]
        return [layer[pages].movedim(token_axis, 1).flatten(0, 1)[:count].clone() for layer in self._cache.layers]
