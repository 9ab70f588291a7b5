"""A model that is no model: its next token is a hash of every token it can read back through its pages.

Ships with the product, for tests of everything around the model. It caches, per layer and token, a row that is a
function of the token and of the row before it, read through the page table; its logits are a function of all rows of
all layers. One stale, foreign, torn or zero page, or one token twice, gives other tokens. Deterministic, the same for
every chunking and batch, on the CPU only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headrace_core.batch.spec import ModelLimits
from headrace_core.batch.step import Chunk, OnLayer, Scoring
from headrace_core.errors import HeadraceError
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.logprobs import logprobs_of
from headrace_core.model.op_timer import OFF, OpTimer
from headrace_core.request import PromptLogprobs
from headrace_core.testing.async_test import WAIT_S
from headrace_core.transfer.memfd import Memfd
from headrace_core.worker.loading import LoadedModel

_MODULUS = 16_777_213
"""The largest prime below 2^24: every residue is exact in float32."""
_WIDTH = 4


class FakeModel:
    """See the module. `salt` makes another model. While `failure` is set, `forward` raises it.

    `raises` may return, for the chunks of a step, what `forward` raises when it has computed all but the last of them
    and all layers but the last. `between_layers` is called with the number of layers done, if they were told.
    A chunk that `is_damaged` fills its part of the cache with NaN; the logits of all that read there are NaN.

    `hold` stops steps at their beginning, `wait_held` returns when one is stopped, `release` lets them go on: so a test
    does what it does while a step is under way, however fast or slow the machine is. Any thread.
    """

    def __init__(self, *, vocab_size: int = 97, num_layers: int = 2, salt: int = 1) -> None:
        self.vocab_size = vocab_size
        self.num_layers = num_layers
        self._salt = salt
        self.failure: Exception | None = None
        self.raises: Callable[[Sequence[Chunk]], Exception | None] = lambda chunks: None
        self.is_damaged: Callable[[Chunk], bool] = lambda chunk: False
        self.between_layers: OnLayer = lambda num_layers: None
        self.num_steps = 0
        self._said: dict[int, PromptLogprobs] = {}
        self._turn = threading.Condition()
        self._num_free: int | None = None
        """Steps that may still run; None: any number."""
        self._is_held = False

    def kv_layout(self, page_size: int) -> KvLayout:
        """Return what its pages hold."""
        return KvLayout(self.num_layers, page_size, CacheDtype.FLOAT32, LatentAttention(_WIDTH - 1, 1))

    def forward(
        self, chunks: Sequence[Chunk], cache: KvCache, timer: OpTimer = OFF, on_layer: OnLayer | None = None
    ) -> Tensor:
        """See `StepModel`."""
        self.num_steps += 1
        self._enter()
        if self.failure is not None:
            raise self.failure
        failure = self.raises(chunks)
        computed = chunks if failure is None else chunks[:-1]
        slots = [_slots(chunk, cache) for chunk in computed]
        for layer in range(self.num_layers):
            if failure is not None and layer == self.num_layers - 1:
                raise failure
            for chunk, its_slots in zip(computed, slots, strict=True):
                self._write(chunk, its_slots, cache, layer)
            if on_layer is not None:
                on_layer(layer + 1)
                self.between_layers(layer + 1)
        pairs = list(zip(computed, slots, strict=True))
        self._said = {
            chunk.key: self._score(chunk, chunk.scoring, its_slots, cache)
            for chunk, its_slots in pairs
            if chunk.scoring is not None
        }
        rows = [self._logits(its_slots, cache) for chunk, its_slots in pairs if chunk.is_sampled]
        return torch.stack(rows) if rows else _NONE

    def take_failures(self) -> dict[int, HeadraceError]:
        """See `StepModel`."""
        return {}

    def take_prompt_logprobs(self) -> dict[int, PromptLogprobs]:
        """See `StepModel`."""
        return self._said

    def take_expert_counts(self) -> dict[int, list[int]]:
        """See `StepModel`."""
        return {}

    def hold(self, *, after: int = 0) -> None:
        """Let `after` steps more begin (one that is held now is the first), and hold those that come then."""
        self._let(after)

    def release(self) -> None:
        """Hold nothing any more."""
        self._let(None)

    def wait_held(self) -> None:
        """Return when a step is held. Not on the event loop."""
        with self._turn:
            assert self._turn.wait_for(lambda: self._is_held, WAIT_S), f"no step came within {WAIT_S} s"

    def _let(self, num_free: int | None) -> None:
        with self._turn:
            self._num_free = num_free
            self._is_held = self._is_held and num_free == 0
            self._turn.notify_all()

    def _enter(self) -> None:
        with self._turn:
            if self._num_free == 0:
                self._is_held = True
                self._turn.notify_all()
                assert self._turn.wait_for(lambda: self._num_free != 0, WAIT_S), f"a step was held for {WAIT_S} s"
            if self._num_free is not None:
                self._num_free -= 1

    def _write(self, chunk: Chunk, slots: Tensor, cache: KvCache, layer: int) -> None:
        values = cache.layers[layer].view(-1, _WIDTH)
        for offset, token_id in enumerate(chunk.token_ids):
            position = chunk.start + offset
            before = int(values[slots[position - 1]].to(torch.int64).sum()) if position else self._salt
            row = [(before * (7 + k) + token_id * 1_000_003 + position * 31 + layer) for k in range(_WIDTH)]
            values[slots[position]] = torch.tensor([value % _MODULUS for value in row], dtype=torch.float32)
        if self.is_damaged(chunk):
            values[slots[chunk.start :]] = torch.nan

    def _score(self, chunk: Chunk, scoring: Scoring, slots: Tensor, cache: KvCache) -> PromptLogprobs:
        first = chunk.start + scoring.first_row + 1
        ends = range(first, first + len(scoring.token_ids))
        logits = torch.stack([self._logits(slots[:end], cache) for end in ends])
        own = torch.tensor(scoring.token_ids)
        best, logprobs = logprobs_of(logits, own, scoring.num_top)
        ranks = (logits > logits.gather(1, own[:, None])).sum(dim=-1) + 1
        tops = best.flatten().tolist(), logprobs[:, 1:].flatten().tolist()
        return PromptLogprobs(first, logprobs[:, 0].tolist(), ranks.tolist(), best.shape[1], *tops)

    def _logits(self, slots: Tensor, cache: KvCache) -> Tensor:
        """Return the logits after the tokens in `slots`."""
        layers = [tensor.view(-1, _WIDTH)[slots] for tensor in cache.layers]
        if any(bool(values.isnan().any()) for values in layers):
            return torch.full((self.vocab_size,), torch.nan)
        weights = (torch.arange(len(slots)) * 7919 + 1)[:, None] + torch.arange(_WIDTH)
        digest = self._salt
        for values in layers:
            digest = digest * 31 + int((values.to(torch.int64) * weights % _MODULUS).sum())
        vocabulary = torch.arange(self.vocab_size, dtype=torch.int64)
        mixed = ((vocabulary + 1) * (digest % _MODULUS + 1) + vocabulary * vocabulary * 104_729) % _MODULUS
        return (mixed.to(torch.float64) / _MODULUS * 8).to(torch.float32)


def _slots(chunk: Chunk, cache: KvCache) -> Tensor:
    """Return where in the flat cache the sequence's tokens up to the chunk's end lie."""
    page_size = cache.layout.page_size
    positions = torch.arange(chunk.start + len(chunk.token_ids))
    return torch.tensor(chunk.page_ids)[positions // page_size] * page_size + positions % page_size


_NONE = torch.empty((0, 0))


def loaded_fake_model(
    *,
    num_pages: int = 64,
    page_size: int = 4,
    max_context_tokens: int = 512,
    eos_token_ids: tuple[int, ...] = (0,),
    fingerprint: str = "fa4e",
    model: FakeModel | None = None,
    memory: Memfd | None = None,
) -> LoadedModel:
    """Return a fake model with its cache, as a worker loads a real one; the cache is poisoned with NaN.

    Over `shm` its pages can be taken if they are built on `memory`.
    """
    model = model or FakeModel()
    layout = model.kv_layout(page_size)
    cache = KvCache(layout, num_pages, "cpu", allocate=memory and memory.allocate)
    for tensor in cache.layers:
        tensor.fill_(torch.nan)
    return LoadedModel(
        name="fake",
        model=model,
        cache=cache,
        limits=ModelLimits(model.vocab_size, max_context_tokens, eos_token_ids),
        layout=layout,
        fingerprint=fingerprint,
        num_pages=num_pages,
        memory=memory,
    )
