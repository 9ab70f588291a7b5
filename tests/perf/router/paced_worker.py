"""A worker of which everything is real but the network: a step takes as long as it is told, on no core.

    python -m tests.perf.router.paced_worker prefill --pace 0.01,0.0002,0.0001 --pool-tokens 8000 --model FOLDER …

The product's own service, scheduler, pages, hand-offs and reports; tokens are all the same. The engine's thread sleeps
until the step would be over, as it waits for a device: so several such workers on one machine do not take each other's
time, which real networks on its cores would. `--pace` is seconds: of a step, of each sequence that decodes in it, of
each prompt token. Every other option is the worker's own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from headrace_core.batch.spec import ModelLimits
from headrace_core.batch.step import Chunk, OnLayer
from headrace_core.command_line import parse
from headrace_core.config import DecodeSettings, PrefillSettings, WorkerSettings
from headrace_core.errors import HeadraceError
from headrace_core.families.config_json import parse_config
from headrace_core.kv.layout import CacheDtype, KvLayout, LatentAttention
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.op_timer import OFF, OpTimer
from headrace_core.process import run
from headrace_core.worker.loading import LoadedModel
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

_LAYERS = 2
_TOKEN = 300
"""What it says, whatever is asked: a word of the demo model's."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds, as `headrace_planner.step_times.LinearStepTimes` has them."""

    fixed_s: float
    row_s: float
    prompt_token_s: float

    @staticmethod
    def read(text: str) -> Pace:
        """Read `fixed,row,token`."""
        return Pace(*map(float, text.split(",")))

    def step_s(self, chunks: Sequence[Chunk]) -> float:
        """Return how long a step takes."""
        rows = sum(len(chunk.token_ids) == 1 and chunk.start > 0 and chunk.is_sampled for chunk in chunks)
        tokens = sum(len(chunk.token_ids) for chunk in chunks) - rows
        return self.fixed_s + self.row_s * rows + self.prompt_token_s * tokens


class PacedModel:
    """See the module, and `executor.StepModel`."""

    def __init__(self, pace: Pace, vocab_size: int) -> None:
        self._pace = pace
        self._logits = torch.zeros(vocab_size)
        self._logits[_TOKEN] = 1.0

    def forward(
        self, chunks: Sequence[Chunk], cache: KvCache, timer: OpTimer = OFF, on_layer: OnLayer | None = None
    ) -> torch.Tensor:
        """Write nothing, and return when the step would be over."""
        until_s = time.monotonic() + self._pace.step_s(chunks)
        while (left_s := until_s - time.monotonic()) > 0:
            time.sleep(left_s)
        for layer in range(_LAYERS if on_layer is not None else 0):
            assert on_layer is not None, "asked above"
            on_layer(layer + 1)
        count = sum(chunk.is_sampled for chunk in chunks)
        return self._logits.expand(count, -1)

    def take_failures(self) -> dict[int, HeadraceError]:
        """See `StepModel`."""
        return {}

    def take_expert_counts(self) -> dict[int, list[int]]:
        """See `StepModel`."""
        return {}


def loaded(settings: WorkerSettings, pace: Pace, pool_tokens: int) -> LoadedModel:
    """Return it with a pool of so many tokens, small ones."""
    config = parse_config(settings.model)
    layout = KvLayout(_LAYERS, settings.page_size, CacheDtype.FLOAT32, LatentAttention(3, 1))
    num_pages = max(1, pool_tokens // settings.page_size)
    cache = KvCache(layout, num_pages, "cpu")
    for tensor in cache.layers:
        tensor.zero_()
    most = settings.max_context_tokens or config.max_context_tokens
    return LoadedModel(
        name="paced",
        model=PacedModel(pace, config.vocab_size),
        cache=cache,
        limits=ModelLimits(config.vocab_size, most, ()),
        layout=layout,
        fingerprint="fa4e" * 16,
        num_pages=num_pages,
    )


def main() -> None:
    """Run until a signal."""
    parser = argparse.ArgumentParser(description="A worker whose steps take as long as they are told.")
    parser.add_argument("kind", choices=["prefill", "decode"])
    parser.add_argument("--pace", type=Pace.read, required=True)
    parser.add_argument("--pool-tokens", type=int, default=1 << 16)
    own, rest = parser.parse_known_args()
    torch.set_num_threads(1)

    def loader(settings: WorkerSettings) -> LoadedModel:
        return loaded(settings, own.pace, own.pool_tokens)

    if own.kind == "prefill":
        prefill = parse(PrefillSettings, rest)
        run(lambda: PrefillService(prefill, loader=loader), prefill, role="prefill")
    decode = parse(DecodeSettings, rest)
    run(lambda: DecodeService(decode, loader=loader), decode, role=decode.role)


if __name__ == "__main__":
    main()
