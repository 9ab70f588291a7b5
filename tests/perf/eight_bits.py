"""What latents, weights or dispatched tokens in 8 bits cost the demo model: its logits, its greedy tokens, its gate.

    PYTHONPATH=demo python -m tests.perf.eight_bits [--prompts 200] [--json build/bench/eight-bits.json]

The prompts are those of the gate (`headrace_demo.evaluate`): heroes that never stood in training text. Each model goes
on with them greedily, and its stories are judged. Then all read a hundred stories of the first one, token by token, and
what they say of the next token is compared. What bfloat16 alone changes stands beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from headrace_core.model.load import load_model
from headrace_core.model.model import Model
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.ranks.dispatch_dtype import DispatchDtype
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_demo.evaluate import Prompt, judge, known_capitals, make_prompts
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

FOLDER = Path("demo/model")
MODELS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float32, fp8 cache": {"dtype": "float32", "kv_cache_dtype": "fp8_e4m3"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, fp8 cache": {"dtype": "bfloat16", "kv_cache_dtype": "fp8_e4m3"},
    "bfloat16, int8 weights": {"dtype": "bfloat16", "weights_dtype": WeightsDtype.INT8},
    "bfloat16, fp8 dispatch": {"dtype": "bfloat16", "dispatch_dtype": DispatchDtype.FP8},
}
"""How each is loaded."""
PAIRS = (
    ("float32, fp8 cache", "float32"),
    ("bfloat16", "float32"),
    ("bfloat16, fp8 cache", "float32"),
    ("bfloat16, fp8 cache", "bfloat16"),
    ("bfloat16, int8 weights", "float32"),
    ("bfloat16, int8 weights", "bfloat16"),
    ("bfloat16, fp8 dispatch", "float32"),
    ("bfloat16, fp8 dispatch", "bfloat16"),
)
_BATCH = 100
_READ, _READ_TOGETHER = 100, 10
_READ_AGAIN, _PIECE = 20, 16
_ROWS, _CONTEXT, _STEPS = 16, 512, 25
_MAX_NEW_TOKENS = 320
_PAGE_SIZE = 64


def token_ids(prompts: list[Prompt], folder: Path) -> list[list[int]]:
    """Return what the router would make of `prompts`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p.text}], add_generation_prompt=True, tokenize=False)
        if p.is_chat
        else f"{tokenizer.bos_token}{p.text}"
        for p in prompts
    ]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def stories(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    """Return what `model` greedily goes on with, to its end-of-text or `_MAX_NEW_TOKENS`."""
    pages = sum(model.kv_layout(_PAGE_SIZE).num_pages(len(prompt) + _MAX_NEW_TOKENS) for prompt in prompts)
    sequences = PagedSequences(model, page_size=_PAGE_SIZE, num_pages=pages, is_poisoned=False)
    outputs: list[list[int]] = [[] for _ in prompts]
    pieces = dict(enumerate(prompts))
    while pieces:
        chunks = [sequences.chunk(key, piece) for key, piece in pieces.items()]
        found = model.forward(chunks, sequences.cache).argmax(dim=1).tolist()
        for key, token in zip(list(pieces), found, strict=True):
            outputs[key].append(token)
            pieces[key] = [token]
            if token in model.config.eos_token_ids or len(outputs[key]) == _MAX_NEW_TOKENS:
                del pieces[key]
    return outputs


def read(model: Model, texts: list[list[int]], *, piece: int = 1 << 20) -> Tensor:
    """Return the logits [tokens, V] after each token of `texts`, read in pieces of so many tokens."""
    pages = sum(model.kv_layout(_PAGE_SIZE).num_pages(len(text)) for text in texts)
    sequences = PagedSequences(model, page_size=_PAGE_SIZE, num_pages=pages, is_poisoned=False)
    found: list[list[Tensor]] = [[] for _ in texts]
    for first in range(0, max(map(len, texts)), piece):
        keys = [key for key, text in enumerate(texts) if first < len(text)]
        chunks = [sequences.chunk(key, texts[key][first : first + piece]) for key in keys]
        for key, logits in zip(keys, model.all_logits(chunks, sequences.cache), strict=True):
            found[key].append(logits)
    return torch.cat([part for parts in found for part in parts])


def add(sums: Counter[str], one: Tensor, two: Tensor) -> None:
    """Count in `sums` how `two` differs from `one`, logits [tokens, V] after the same tokens."""
    difference = (one - two).abs()
    log_p, log_q = one.log_softmax(dim=1), two.log_softmax(dim=1)
    sums["tokens"] += len(one)
    sums["difference"] += difference.mean(dim=1).sum().item()
    sums["kl"] += (log_p.exp() * (log_p - log_q)).sum().item()
    sums["same"] += (one.argmax(dim=1) == two.argmax(dim=1)).sum().item()
    sums["largest"] = max(sums["largest"], difference.max().item())


def read_by_all(models: dict[str, Model], texts: list[list[int]]) -> dict[str, Counter[str]]:
    """Let every model read `texts`; return what `add` counts for each of PAIRS."""
    sums: dict[str, Counter[str]] = {f"{other} against {one}": Counter() for other, one in PAIRS}
    for first in range(0, len(texts), _READ_TOGETHER):
        some = texts[first : first + _READ_TOGETHER]
        logits = {name: read(model, some) for name, model in models.items()}
        for other, one in PAIRS:
            add(sums[f"{other} against {one}"], logits[one], logits[other])
    return sums


def read_again(model: Model, texts: list[list[int]]) -> Counter[str]:
    """Read `texts` whole and in pieces, as another worker might that computes them again; return what `add` counts."""
    sums: Counter[str] = Counter()
    for text in texts:
        add(sums, read(model, [text]), read(model, [text], piece=_PIECE))
    return sums


def step_cost(models: dict[str, Model]) -> dict[str, float]:
    """Return the CPU time of a decode step of 16 rows at a context of 512 tokens, ms; medians of turns taken."""
    caches = {name: PagedSequences(model, page_size=_PAGE_SIZE, num_pages=160) for name, model in models.items()}
    for name, model in models.items():
        for key in range(_ROWS):
            model.forward([caches[name].chunk(key, [5] * _CONTEXT)], caches[name].cache)
    spent: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(_STEPS):
        for name, model in models.items():
            chunks = [caches[name].chunk(key, [7]) for key in range(_ROWS)]
            began_s = time.process_time()
            model.forward(chunks, caches[name].cache)
            spent[name].append(1000 * (time.process_time() - began_s))
    return {name: statistics.median(each) for name, each in spent.items()}


def common(one: list[int], two: list[int]) -> int:
    """Return how many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def differences(sums: Counter[str]) -> dict[str, float]:
    """Return the figures of what `add` counted."""
    return {
        "logits_largest_difference": sums["largest"],
        "logits_mean_difference": sums["difference"] / sums["tokens"],
        "kl_nats_per_token": sums["kl"] / sums["tokens"],
        "same_argmax": sums["same"] / sums["tokens"],
    }


def measure(prompts: list[Prompt], folder: Path) -> dict[str, Any]:
    """Return the gate's verdict on each of MODELS, and how each of PAIRS differs."""
    ids, known, bare = token_ids(prompts, folder), known_capitals(), Tokenizer.from_file(str(folder / "tokenizer.json"))
    models = {name: load_model(folder, **options) for name, options in MODELS.items()}
    told: dict[str, list[list[int]]] = {}
    figures: dict[str, Any] = {"num_prompts": len(prompts)}
    for name, model in models.items():
        batches = [ids[first : first + _BATCH] for first in range(0, len(ids), _BATCH)]
        told[name] = [story for batch in batches for story in stories(model, batch)]
        verdict = judge(prompts, [bare.decode(story, skip_special_tokens=False) for story in told[name]], known)
        figures[name] = {"token_bytes": model.kv_layout(_PAGE_SIZE).token_bytes}
        figures[name] |= {"kept": verdict.kept, "faithful": verdict.faithful, "ended": verdict.ended}
        sys.stderr.write(f"{name}: {figures[name]}\n")
    texts = [prompt + story for prompt, story in zip(ids, told["float32"], strict=True)][:_READ]
    for name, model in models.items():
        figures[name]["read in pieces"] = differences(read_again(model, texts[:_READ_AGAIN]))
    sums = read_by_all(models, texts)
    for other, one in PAIRS:
        found, pairs = sums[f"{other} against {one}"], list(zip(told[one], told[other], strict=True))
        figures[f"{other} against {one}"] = differences(found) | {
            "same_stories": sum(a == b for a, b in pairs) / len(pairs),
            "tokens_before_the_first_other": sum(common(a, b) for a, b in pairs) / sum(len(a) for a, _ in pairs),
        }
    figures["decode_step_cpu_ms"] = step_cost(models)
    return figures


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--json", type=Path, default=Path("build/bench/eight-bits.json"))
    options = parser.parse_args()
    text = json.dumps(measure(make_prompts(options.prompts), options.model), indent=1) + "\n"
    sys.stdout.write(text)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(text)


if __name__ == "__main__":
    main()
