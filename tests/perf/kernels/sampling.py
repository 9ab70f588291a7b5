"""Drawing tokens, beside torch: its argmax for greedy rows, and for the rest the sampler's torch formulation.

torch's formulation of a draw looks at the rows on the host, so it is timed without a graph.

The floor counts one pass over the logits; a draw takes two, and three with a threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from headrace_kernels import use_backend
from headrace_kernels.backend import Backend
from headrace_kernels.draws import Draws
from headrace_kernels.gpu.configs import Config
from headrace_kernels.sampling import sample_tokens
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, Calls, TuningCase, num_buffers
from tests.perf.kernels.tiles import fits

VOCAB_SIZES = {"V2-Lite": 102_400, "V3": 129_280, "K2": 163_840}
ROWS = (1, 32, 128)
# Temperature, top-k, top-p.
KINDS = {"greedy": (0.0, 0, 1.0), "plain": (1.0, 0, 1.0), "top-p 0.95": (1.0, 0, 0.95), "top-k 50": (1.0, 50, 1.0)}


def cases() -> list[BenchCase]:
    """Each vocabulary, number of rows and kind of draw."""
    return [_case(model, rows, kind) for model in VOCAB_SIZES for rows in ROWS for kind in KINDS]


def tuning() -> list[TuningCase]:
    """Tiles, by vocabulary."""
    changes: list[Config] = [
        {"BLOCK_V": whole, "BLOCK_PIVOTS": pivots, "NUM_PIVOTS": num_pivots, "num_warps": num_warps}
        for whole in (2048, 4096, 8192)
        for pivots, num_pivots in ((256, 16), (512, 8), (1024, 4))
        for num_warps in (8, 16)
        # Each comparison with a pivot is a float64.
        if fits(num_warps, values=max(whole, 2 * pivots * num_pivots))
    ]
    return [("sampling", f"{size}", changes, _case(model, 32, "top-p 0.95")) for model, size in VOCAB_SIZES.items()]


def _case(model: str, rows: int, kind: str) -> BenchCase:
    vocab_size = VOCAB_SIZES[model]
    return BenchCase(
        family="sampling",
        shape=f"{model} V={vocab_size} L={rows} {kind}",
        calls=_calls(rows, vocab_size, kind, "triton"),
        bytes_moved=4.0 * rows * vocab_size,
        peers={"torch": _torch_argmax(rows, vocab_size)} if kind == "greedy" else {},
        eager_peers={} if kind == "greedy" else {"torch, eager": _calls(rows, vocab_size, kind)},
    )


def _calls(rows: int, vocab_size: int, kind: str, name: Backend = "reference") -> Calls:
    temperature, top_k, top_p = KINDS[kind]

    def run(logits: Tensor, draws: Draws) -> Tensor:
        with use_backend(name):
            return sample_tokens(logits, draws)

    def make() -> list[Callable[[], object]]:
        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device="cuda")

        positions = torch.arange(rows, device="cuda")
        draws = Draws(
            column(temperature, torch.float64),
            column(top_k, torch.int64),
            column(top_p, torch.float64),
            column(0.0, torch.float64),
            positions,
            column(0, torch.int64),
            positions,
        )
        return [partial(run, logits, draws) for logits in _logits(rows, vocab_size)]

    return make


def _torch_argmax(rows: int, vocab_size: int) -> Calls:
    return lambda: [partial(torch.argmax, logits, dim=-1) for logits in _logits(rows, vocab_size)]


def _logits(rows: int, vocab_size: int) -> list[Tensor]:
    """Logits whose best tokens stand out about as a language model's do."""
    count = num_buffers(4.0 * rows * vocab_size)
    return [3 * torch.randn(rows, vocab_size, device="cuda") for _ in range(count)]
