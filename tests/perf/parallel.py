"""What ranks cost and win: `make bench-parallel`. Steps of each layout, uneven experts, EPLB, plans, drafts.

Steps are in `parallel_steps`. The rest is what uneven experts cost a group of ranks, and what EPLB wins back.

Ranks share a machine's cores here, so a clock on the wall would show nothing. The critical path does: in each layer and
step every rank's experts compute what falls to them, one after another on one thread, and their CPU time is taken; the
layer takes as long as the busiest. Loss is 1 - mean / busiest, of sums over layers and steps; the same in time is
busiest / mean - 1. Placements are learnt from the first half of the steps and judged on the second.

    real     the demo model's router, on stories of its own grammar
    zipf-s   popularity falling as rank^-s, another order of experts in each layer

Beside it the prediction of `expert_placement` by tokens alone. Writes build/bench/parallel.json. `combos` are those of
the last `make parity-full`, with the commit that it was of; null if there was none.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from headrace_core.expert_placement import Placement, balanced, in_order
from headrace_core.model.load import load_model
from headrace_core.roofline.routing import Routing
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_demo.evaluate import make_prompts
from headrace_kernels.experts import Experts, empty_experts
from headrace_kernels.routing_rule import RoutedTokens
from tokenizers import Tokenizer

from tests.perf import drafts, plan_size
from tests.perf.machine import machine
from tests.perf.parallel_steps import measure_layouts
from tests.perf.report_file import merge, read

_log = logging.getLogger(__name__)
_REPORT = Path("build/bench/parallel.json")
_DEMO = Path("demo/model")
_PARITY = Path("build/parity-full.json")
_PAGE_SIZE = 64
"""Of the plan: a worker's own default."""
_EXPONENTS = (0.8, 1.0, 1.2)
_TOKENS, _LAYERS, _STEPS = 256, 4, 24
_ROUNDS = 3
"""Of which the least time counts."""


class Sizes(NamedTuple):
    """Of the layers that are timed."""

    hidden: int
    width: int
    num_experts: int
    num_per_token: int


Counts = list[int]
Trace = list[list[Counts]]
"""Tokens of each expert, by step, then layer."""

_WIDE = Sizes(hidden=256, width=128, num_experts=64, num_per_token=6)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--json", type=Path, default=_REPORT)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    real, sizes = _real_trace()
    cases = {"real": _case(real, sizes, arguments.ranks, redundant=arguments.ranks)}
    for exponent in _EXPONENTS:
        redundant = _WIDE.num_experts // 4
        cases[f"zipf-{exponent}"] = _case(_zipf_trace(exponent), _WIDE, arguments.ranks, redundant)
    steps = measure_layouts(_DEMO, _text())
    for row in steps["layouts"]:
        _log.info(
            "%s, %d rows: %.0f us (%.0f by formula), %.0f bytes a token (%.0f)",
            " = ".join(row["names"]), row["batch"], row["step_us"], row["step_us_predicted"],
            row["bytes_per_token"], row["bytes_per_token_by_formula"],
        )  # fmt: skip
    plan = plan_size.measure(_PAGE_SIZE)
    mtp = drafts.mtp_tokens_per_step()
    parity = read(_PARITY)
    values = {
        "machine": machine(),
        "command": sys.argv,
        "ranks": arguments.ranks,
        "combos": parity.get("combos"),
        "combos_identical": parity.get("combos_identical"),
        "combos_commit": parity.get("machine", {}).get("commit"),
        "imbalance_loss_zipf": cases["zipf-1.0"]["as_numbered"]["loss"],
        "imbalance_loss_eplb": cases["zipf-1.0"]["eplb"]["loss"],
        "mtp_tokens_per_step": mtp["tokens_per_row"],
        "mtp": mtp,
        "plan_bytes_256x4096": plan["mean_bytes"],
        "plan": plan,
        "steps": steps,
        "cases": cases,
    }
    merge(arguments.json, values)
    _log.info("%s", {name: value for name, value in values.items() if not isinstance(value, (dict, list))})
    _log.info("%s", arguments.json)


def _case(trace: Trace, sizes: Sizes, num_ranks: int, redundant: int) -> dict[str, Any]:
    """Return loss and its prediction for experts as numbered and as EPLB places them, and what that wins back."""
    learnt, judged = trace[: len(trace) // 2], trace[len(trace) // 2 :]
    layers = [_experts(sizes, seed) for seed in range(len(trace[0]))]
    loads = [[float(sum(step[layer][e] for step in learnt)) for e in range(sizes.num_experts)] for layer in
             range(len(layers))]  # fmt: skip
    placements = {
        "as_numbered": [in_order(sizes.num_experts, num_ranks)] * len(layers),
        "eplb": [balanced(load, num_ranks, redundant=redundant) for load in loads],
    }
    found = {name: _measured(layers, judged, sizes, placed) for name, placed in placements.items()}
    before, after = found["as_numbered"]["loss"], found["eplb"]["loss"]
    case = {"redundant": redundant, **sizes._asdict(), **found, "won_back": 1 - after / before if before else None}
    summary = {name: [round(each["loss"], 3), round(each["predicted_loss"], 3)] for name, each in found.items()}
    _log.info("loss, predicted: %s, won back %.2f", summary, case["won_back"] or 0.0)
    return case


def _measured(layers: Sequence[Experts], judged: Trace, sizes: Sizes, placed: Sequence[Placement]) -> dict[str, Any]:
    busiest_s = mean_s = busiest = mean = 0.0
    samples: list[list[float]] = []
    for step in judged:
        for experts, counts, placement in zip(layers, step, placed, strict=True):
            of_ranks = _parts(counts, placement)
            seconds = [_seconds(experts, part, sizes) for part in of_ranks]
            tokens = [sum(part.values()) for part in of_ranks]
            samples.append(seconds)
            busiest_s, mean_s = busiest_s + max(seconds), mean_s + sum(seconds) / len(seconds)
            busiest, mean = busiest + max(tokens), mean + sum(tokens) / len(tokens)
    return {
        "loss": 1 - mean_s / busiest_s,
        "time_more": busiest_s / mean_s - 1,
        "predicted_loss": 1 - mean / busiest,
        "samples_us": [[round(each * 1e6, 1) for each in sample] for sample in samples],
    }


def _parts(counts: Counts, placement: Placement) -> list[dict[int, int]]:
    """Return each rank's tokens by expert; replicas take turns."""
    parts: list[dict[int, int]] = [{} for _ in placement.ranks]
    for expert, ranks in enumerate(placement.owners()):
        for turn, rank in enumerate(ranks):
            parts[rank][expert] = (counts[expert] + len(ranks) - 1 - turn) // len(ranks)
    return parts


def _seconds(experts: Experts, part: dict[int, int], sizes: Sizes) -> float:
    """Return the CPU time of one rank's experts, a row for each of their tokens."""
    chosen = torch.tensor([expert for expert, count in part.items() for _ in range(count)]).view(-1, 1)
    if not len(chosen):
        return 0.0
    x = torch.zeros(len(chosen), sizes.hidden, dtype=torch.bfloat16)
    rows = RoutedTokens(x, chosen, torch.ones(chosen.shape), None)
    best = float("inf")
    for _ in range(_ROUNDS):
        began = time.thread_time()
        experts(rows, x)
        best = min(best, time.thread_time() - began)
    return best


def _experts(sizes: Sizes, seed: int) -> Experts:
    generator = torch.Generator().manual_seed(seed)
    experts = empty_experts(sizes.num_experts, sizes.hidden, sizes.width, torch.empty(0, dtype=torch.bfloat16))
    for expert in range(sizes.num_experts):
        gate, up, down = (
            torch.randn(shape, generator=generator).bfloat16()
            for shape in ((sizes.width, sizes.hidden), (sizes.width, sizes.hidden), (sizes.hidden, sizes.width))
        )
        experts.put(expert, gate, up, down)
    return experts


def _zipf_trace(exponent: float) -> Trace:
    """Return steps of tokens that each choose different experts, with chances that fall by Zipf's law."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor(Routing(zipf=exponent).probabilities(_WIDE.num_experts, _WIDE.num_per_token))
    orders = [torch.randperm(_WIDE.num_experts, generator=generator) for _ in range(_LAYERS)]

    def counts(order: torch.Tensor) -> Counts:
        weights = chances[order].expand(_TOKENS, -1)
        chosen = torch.multinomial(weights, _WIDE.num_per_token, generator=generator)
        return torch.bincount(chosen.flatten(), minlength=_WIDE.num_experts).tolist()

    return [[counts(order) for order in orders] for _ in range(_STEPS)]


def _real_trace() -> tuple[Trace, Sizes]:
    """Return what the demo model's router chose for prompts of its grammar, in steps of about `_TOKENS`."""
    model = load_model(_DEMO)
    moe = model.config.moe
    trace: Trace = []
    for texts in _texts(Tokenizer.from_file(str(_DEMO / "tokenizer.json"))):
        sequences = PagedSequences(model, page_size=16, num_pages=64)
        model.forward([sequences.chunk(key, tokens) for key, tokens in enumerate(texts)], sequences.cache)
        trace.append(list(model.take_expert_counts().values()))
    sizes = Sizes(model.config.hidden_size, moe.intermediate_size, moe.num_experts, moe.num_experts_per_token)
    return trace, sizes


def _text() -> list[int]:
    """Return the tokens of stories of the demo model's grammar, one after another."""
    tokenizer = Tokenizer.from_file(str(_DEMO / "tokenizer.json"))
    return [token for prompt in make_prompts(200) for token in tokenizer.encode(prompt.text).ids]


def _texts(tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    prompts = iter(make_prompts(1000))
    for _ in range(_STEPS):
        texts: list[list[int]] = []
        while sum(map(len, texts)) < _TOKENS:
            texts.append(tokenizer.encode(next(prompts).text).ids)
        yield texts


if __name__ == "__main__":
    main()
