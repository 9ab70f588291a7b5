"""Drive a model over scattered, poisoned pages: what parity tests and benchmarks share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from headrace_core.batch.step import Chunk, ForwardPlan, SamplingRow, StepPlan
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.model import Model
from headrace_core.ranks.group import ALONE, Ranks
from headrace_core.request import SamplingParams

_GREEDY_ROW = SamplingRow(SamplingParams(temperature=0.0, seed=0), [], [], 0, 0, ())


def greedy_plan(chunks: list[Chunk], zero_page_ids: Sequence[int] = (), stops: tuple[int, ...] = ()) -> StepPlan:
    """Return the step of these chunks, in which those that are sampled take the likeliest token."""
    return StepPlan(
        ForwardPlan(chunks, list(zero_page_ids), stops), {c.key: _GREEDY_ROW for c in chunks if c.is_sampled}
    )


class PagedSequences:
    """Sequences whose pages are drawn at random from a pool full of NaN, so that any read out of place shows."""

    def __init__(self, model: Model, *, page_size: int, num_pages: int, is_poisoned: bool = True) -> None:
        self.cache = KvCache(model.kv_layout(page_size), num_pages, model.device)
        self._page_size = page_size
        self._free = list(range(num_pages))
        random.Random(0).shuffle(self._free)
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        if is_poisoned:
            for layer in self.cache.layers:
                # Of fp8 rows, 0xFF is NaN in latents, scales and rope columns.
                layer.fill_(float("nan") if layer.is_floating_point() else 0xFF)

    def free_all(self) -> None:
        """Forget every sequence and take its pages back; their contents stay. Shared prefixes are not allowed for."""
        for pages in self._pages.values():
            self._free += pages
        self._pages.clear()
        self._lengths.clear()

    def num_computed(self, key: int) -> int:
        """Return how many tokens of sequence `key` have been handed out as chunks."""
        return self._lengths.get(key, 0)

    def pages(self, key: int) -> list[int]:
        """Return the pages of sequence `key`, in order."""
        return list(self._pages[key])

    def chunk(self, key: int, token_ids: Sequence[int], *, is_sampled: bool = True) -> Chunk:
        """Return the chunk that continues sequence `key` with `token_ids`, taking the pages it needs."""
        start = self._lengths.get(key, 0)
        pages = self._pages.setdefault(key, [])
        end = start + len(token_ids)
        while len(pages) * self._page_size < end:
            pages.append(self._free.pop())
        self._lengths[key] = end
        return Chunk(key, list(token_ids), start, list(pages), is_sampled)

    def share_pages(self, source: int, key: int, num_tokens: int) -> None:
        """Start sequence `key` with the first `num_tokens` of `source`: whole pages only."""
        assert num_tokens % self._page_size == 0, "a shared prefix is whole pages"
        self._pages[key] = self._pages[source][: num_tokens // self._page_size]
        self._lengths[key] = num_tokens


def generate_greedy(
    model: Model,
    prompts: Sequence[list[int]],
    num_tokens: int,
    *,
    page_size: int,
    max_chunk: int,
    prepare: Callable[[KvCache], None] | None = None,
    ranks: Ranks = ALONE,
) -> list[list[int]]:
    """Return `num_tokens` greedy tokens for each prompt, batched as an engine would.

    In a group all `ranks` call it; sequences take turns at its lanes.

    Prompts enter in chunks of at most `max_chunk` tokens, one step after another, while sequences whose prompts are
    computed decode in the same steps. `prepare` is given the cache before the first step.
    """
    longest = max(len(prompt) for prompt in prompts) + num_tokens
    num_pages = len(prompts) * (-(-longest // page_size))
    sequences = PagedSequences(model, page_size=page_size, num_pages=num_pages)
    if prepare is not None:
        prepare(sequences.cache)
    outputs: list[list[int]] = [[] for _ in prompts]
    while any(len(output) < num_tokens for output in outputs):
        chunks: list[Chunk] = []
        for key, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            done = sequences.num_computed(key)
            if done < len(prompt):
                piece = prompt[done : done + max_chunk]
                is_sampled = done + len(piece) == len(prompt)
                chunks.append(sequences.chunk(key, piece, is_sampled=is_sampled))
            elif len(output) < num_tokens:
                chunks.append(sequences.chunk(key, output[-1:]))
        chunks = [replace(chunk, lane=chunk.key % ranks.layout.num_lanes) for chunk in chunks]
        tokens = model.forward(chunks, sequences.cache).argmax(dim=-1).tolist()
        tokens = json.loads(ranks.world.broadcast_bytes(json.dumps(tokens).encode()))
        sampled = [chunk.key for chunk in chunks if chunk.is_sampled]
        for key, token in zip(sampled, tokens, strict=True):
            outputs[key].append(token)
    return outputs
