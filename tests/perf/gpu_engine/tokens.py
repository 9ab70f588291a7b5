"""Part `tokens`: greedy tokens of small checkpoints in float32, beside transformers on the same device."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from headrace_core.errors import CheckpointError, StartupError
from headrace_core.model.decode_graphs import Capture
from headrace_core.model.kv_cache import KvCache
from headrace_core.model.load import load_model
from headrace_core.model.model import Model
from headrace_core.model.self_check import check_kernels
from headrace_core.testing.paged_sequences import generate_greedy
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, Config, write_checkpoint

from tests.perf.gpu_engine.shapes import KERNEL_WIDTHS

CONFIGS: dict[str, Config] = {
    "v3": {**TINY_CONFIGS["v3"], **KERNEL_WIDTHS},
    "v2-lite": {**TINY_CONFIGS["v2-lite"], **KERNEL_WIDTHS, "q_lora_rank": None},
    "mixtral": {**TINY_CONFIGS["mixtral"], "head_dim": 16},
}
DEMO_MODEL = Path(__file__).parents[3] / "demo" / "model"
_PROMPT_TOKENS = (3, 21, 12)
_PAGE_SIZE = 16
_MAX_CHUNK = 16


def compare_tokens(
    folder: Path,
    names: Sequence[str],
    *,
    device: str,
    num_tokens: int,
    report: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Return, by checkpoint, how many greedy tokens equal transformers', and what the worker's own check finds.

    `names` are of `CONFIGS`, whose checkpoints are written into `folder`, or "demo". `keep` gets the part's figures
    so far after each.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        report(f"greedy tokens of {name}")
        checkpoint = DEMO_MODEL if name == "demo" else folder / name
        if name != "demo":
            write_checkpoint(checkpoint, CONFIGS[name])
        found[name] = _compare(checkpoint, device, num_tokens)
        keep({"checkpoints": found})
    return found


def _compare(checkpoint: Path, device: str, num_tokens: int) -> dict[str, Any]:
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    prompts = [random.Random(count).choices(range(3, vocab_size), k=count) for count in _PROMPT_TOKENS]
    expected = transformers_greedy(checkpoint, prompts, num_tokens, device)
    model = load_model(checkpoint, dtype="float32", device=device)
    found: dict[str, Any] = {"kernels_check": _check(model, device), "num_tokens": num_tokens * len(prompts)}
    for form, is_captured in (("equal", False), ("equal_captured", True)):
        found[form] = num_equal(_greedy(model, prompts, num_tokens, is_captured=is_captured), expected)
    return found


def _check(model: Model, device: str) -> float | str:
    try:
        return check_kernels(model, device, _PAGE_SIZE)
    except (CheckpointError, StartupError) as error:
        return str(error)


def _greedy(model: Model, prompts: list[list[int]], num_tokens: int, *, is_captured: bool) -> list[list[int]]:
    """Return our tokens; `is_captured`: decode steps run as a worker captures them."""
    # None: CUDA graphs; elsewhere the joined form is called.
    capture: Capture | None = None if model.device == "cuda" else lambda run: run

    def prepare(cache: KvCache) -> None:
        longest = max(map(len, prompts)) + num_tokens
        model.prepare_decode(cache, max_rows=len(prompts), max_context_tokens=longest, capture=capture)

    try:
        return generate_greedy(
            model,
            prompts,
            num_tokens,
            page_size=_PAGE_SIZE,
            max_chunk=_MAX_CHUNK,
            prepare=prepare if is_captured else None,
        )
    finally:
        model.forget_decode()


def transformers_greedy(
    checkpoint: Path, prompts: Sequence[list[int]], num_tokens: int, device: str
) -> list[list[int]]:
    """Return transformers' greedy tokens of each prompt alone, in float32 on `device`."""
    oracle = load_oracle(checkpoint, device)
    import transformers

    settings = transformers.GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    outputs: list[list[int]] = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        output = oracle.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def load_oracle(checkpoint: Path, device: str) -> Any:
    """Return transformers' model in float32 on `device`, its experts one after another.

    What it takes by default, `torch._grouped_mm`, is bfloat16's on a GPU: float32 depends on torch's fallback.
    """
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        oracle: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, experts_implementation="eager"
        )
    oracle.to(device).eval()
    # generate() would fill an unset end from here.
    oracle.generation_config.eos_token_id = None
    return oracle


def num_equal(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> int:
    """Return how many tokens are equal up to each sequence's first that is not."""
    total = 0
    for ours, theirs in zip(found, expected, strict=True):
        differs = (index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        total += next(differs, len(theirs))
    return total
