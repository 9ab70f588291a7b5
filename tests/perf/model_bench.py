"""Speed and memory of the model on a CPU beside transformers, on the same checkpoint, in one run.

    OMP_NUM_THREADS=2 python -m tests.perf.model_bench build/checkpoint-280m --threads 2

Both engines live in one process and take turns, step by step, so that what else the machine does hits both; figures
are medians. Memory is each engine's peak in a process of its own. transformers runs as `from_pretrained` sets it up,
without `generate` around it, which is in its favour.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from headrace_core.batch.step import Chunk
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.load import load_model
from headrace_core.model.model import Model
from headrace_core.model.numerics import Numerics
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_kernels.backend import backend

PAGE_SIZE = 64
CHUNK_TOKENS = 512
DECODE_CONTEXT = 256
DECODE_STEPS = 12
PREFILL_ROUNDS = 5
MAX_ROWS = 64
MIB = 1 << 20
_MARGIN_BYTES = 300 * MIB

_log = logging.getLogger(__name__)


class HeadraceEngine:
    """Our model over pages, one step at a time."""

    def __init__(
        self,
        directory: Path,
        num_pages: int,
        numerics: Numerics = Numerics.FAST,
        weights_dtype: WeightsDtype = WeightsDtype.AUTO,
    ) -> None:
        self.model: Model = load_model(directory, numerics=numerics, weights_dtype=weights_dtype)
        self._num_pages = num_pages
        self._sequences = PagedSequences(self.model, page_size=PAGE_SIZE, num_pages=num_pages, is_poisoned=False)
        record_decode(self.model, self._sequences.cache)

    def prefill(self, prompts: list[list[int]]) -> None:
        """Compute prompts in chunks, as a worker does."""
        self._sequences.free_all()
        for key, prompt in enumerate(prompts):
            for first in range(0, len(prompt), CHUNK_TOKENS):
                piece = prompt[first : first + CHUNK_TOKENS]
                is_last = first + len(piece) == len(prompt)
                chunk = self._sequences.chunk(key, piece, is_sampled=is_last)
                self._forward([chunk])

    def decode(self, tokens: list[int]) -> None:
        """Compute one more token of each sequence."""
        self._forward([self._sequences.chunk(key, [token]) for key, token in enumerate(tokens)])

    def pool_bytes(self) -> int:
        """Bytes that the pages take."""
        return self._num_pages * self.model.kv_layout(PAGE_SIZE).page_bytes

    def _forward(self, chunks: list[Chunk]) -> None:
        self.model.forward(chunks, self._sequences.cache).argmax(dim=-1).tolist()


def record_decode(model: Model, cache: KvCache) -> None:
    """Let decode steps be recorded, as a decode worker does where it computes with compiled kernels."""
    if backend(cache.layers[0]) == "cpu":
        model.record_decode(cache, max_rows=MAX_ROWS, max_context_tokens=model.config.max_context_tokens)


class TransformersEngine:
    """transformers' model with its own cache; `dtype` "auto": the checkpoint's."""

    def __init__(self, directory: Path, dtype: str = "auto") -> None:
        os.environ["TRANSFORMERS_OFFLINE"] = "1"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers

            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        self._model.eval()
        self._cache: Any = None

    def prefill(self, prompts: list[list[int]]) -> None:
        """Compute prompts of one length as one batch."""
        self._cache = None
        self._forward(prompts)

    def decode(self, tokens: list[int]) -> None:
        """Compute one more token of each sequence."""
        self._forward([[token] for token in tokens])

    def _forward(self, rows: list[list[int]]) -> None:
        with torch.inference_mode():
            output = self._model(torch.tensor(rows), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = output.past_key_values
            output.logits[:, -1].argmax(dim=-1).tolist()


def bench_model(
    checkpoint_dir: Path, *, threads: int, batches: Sequence[int], prompt_lengths: Sequence[int]
) -> dict[str, Any]:
    """Measure decode, prefill and memory of both engines.

    Returns:
        `decode[batch]`: ms per step at a context of 256 and their ratio; `prefill[length]`: tokens per second and their
        ratio (a ratio above 1: Headrace is faster); `memory`: MiB at peak, and Headrace's bound.
    """
    torch.set_num_threads(threads)
    longest = max((*prompt_lengths, max(batches) * (DECODE_CONTEXT + PAGE_SIZE)))
    ours = HeadraceEngine(checkpoint_dir, -(-longest // PAGE_SIZE) + max(batches))
    theirs = TransformersEngine(checkpoint_dir)
    vocab_size = ours.model.config.vocab_size
    return {
        "threads": threads,
        "decode": {batch: _bench_decode(ours, theirs, batch, vocab_size) for batch in batches},
        "prefill": {length: _bench_prefill(ours, theirs, length, vocab_size) for length in prompt_lengths},
        "memory": bench_memory(checkpoint_dir, threads=threads, prompt_length=max(prompt_lengths)),
    }


def _bench_decode(ours: HeadraceEngine, theirs: TransformersEngine, batch: int, vocab_size: int) -> dict[str, float]:
    prompts = random_prompts(batch, DECODE_CONTEXT, vocab_size)
    ours.prefill(prompts)
    theirs.prefill(prompts)
    tokens = [prompt[0] for prompt in prompts]
    ours_s, theirs_s = _take_turns(lambda: ours.decode(tokens), lambda: theirs.decode(tokens), DECODE_STEPS)
    return {
        "headrace_ms": round(ours_s * 1e3, 2),
        "transformers_ms": round(theirs_s * 1e3, 2),
        "ratio": round(theirs_s / ours_s, 2),
    }


def _bench_prefill(ours: HeadraceEngine, theirs: TransformersEngine, length: int, vocab_size: int) -> dict[str, float]:
    prompts = random_prompts(1, length, vocab_size)
    ours_s, theirs_s = _take_turns(lambda: ours.prefill(prompts), lambda: theirs.prefill(prompts), PREFILL_ROUNDS)
    return {
        "headrace_tokens_per_s": round(length / ours_s, 1),
        "transformers_tokens_per_s": round(length / theirs_s, 1),
        "ratio": round(theirs_s / ours_s, 2),
    }


def _take_turns(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Return the median seconds of each, after a round that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for engine, seen in zip((ours, theirs), times, strict=True):
            begin = time.perf_counter()
            engine()
            if number:
                seen.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def random_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Return `count` prompts of random tokens, the same each time."""
    generator = torch.Generator().manual_seed(count * length)
    return torch.randint(3, vocab_size, (count, length), generator=generator).tolist()


def bench_memory(checkpoint_dir: Path, *, threads: int, prompt_length: int) -> dict[str, float]:
    """Return each engine's peak resident memory, MiB, over load, one prompt and a batch of 16, in fresh processes."""
    found: dict[str, float] = {}
    for engine in ("headrace", "transformers"):
        command = [sys.executable, "-m", "tests.perf.model_bench", str(checkpoint_dir)]
        command += ["--threads", str(threads), "--prompt-lengths", str(prompt_length)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        output = subprocess.run(
            [*command, "--memory-of", engine],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        ).stdout
        found.update(json.loads(output.splitlines()[-1]))
    return found


def _memory_of(engine: str, checkpoint_dir: Path, prompt_length: int) -> dict[str, float]:
    num_pages = -(-prompt_length // PAGE_SIZE) + 16 * 5
    runner = HeadraceEngine(checkpoint_dir, num_pages) if engine == "headrace" else TransformersEngine(checkpoint_dir)
    vocab_size = json.loads((checkpoint_dir / "config.json").read_text())["vocab_size"]
    runner.prefill(random_prompts(1, prompt_length, vocab_size))
    runner.prefill(random_prompts(16, DECODE_CONTEXT, vocab_size))
    for _ in range(4):
        runner.decode([5] * 16)
    found = {f"{engine}_peak_mib": round(_peak_bytes() / MIB, 1)}
    if isinstance(runner, HeadraceEngine):
        weights = runner.model.weight_bytes
        bound = math.floor(1.15 * weights) + runner.pool_bytes() + _MARGIN_BYTES
        found["headrace_weights_mib"] = round(weights / MIB, 1)
        found["headrace_bound_mib"] = round(bound / MIB, 1)
    return found


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--prompt-lengths", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--memory-of", choices=["headrace", "transformers"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        found = _memory_of(options.memory_of, options.checkpoint, max(options.prompt_lengths))
        _log.info(json.dumps(found))
        return
    found = bench_model(
        options.checkpoint,
        threads=options.threads,
        batches=options.batches,
        prompt_lengths=options.prompt_lengths,
    )
    _log.info(json.dumps(found, indent=1))


if __name__ == "__main__":
    _main()
