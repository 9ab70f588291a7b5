"""Every layout of ranks against transformers, on both sides of a hand-off: `make parity-full`.

For each network, attention × experts, the group computes prompts and goes on with them, hands them to a process alone,
takes them from one, and does both with every other layout of as many ranks. 64 greedy tokens each. Prompts are chosen
so that tokens tell something: 16 different ones at least, none of them nearly another. Then fleets of workers are
served in which one side or both are groups, of lanes and of heads. Writes build/parity-full.json; exits with 1 if any
token differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.testing.rank_processes import run_ranks
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_checkpoint
from rich.console import Console

from tests.parity.conftest import Oracle
from tests.parity_full.party import ONE_PROCESS, hand_off_all
from tests.parity_full.served import Turns, serve_all, write_served
from tests.perf.machine import machine

ROOT = Path(__file__).parents[2]
_ATTENTION, _EXPERTS = ("tp1", "tp2", "dp2"), ("tp2", "ep2", "ep4")
_LENGTHS, _NUM_TOKENS = (3, 16, 57), 64
_LEAST_DIFFERENT, _LEAST_MARGIN = 16, 1e-3


class Prompt(NamedTuple):
    """A prompt that tells something, and what transformers makes of it."""

    token_ids: list[int]
    output: list[int]
    margin: float


def main() -> None:
    """Run and exit with 1 on any difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["v3", "v2", "mixtral"], choices=list(TINY_CONFIGS))
    parser.add_argument("--served", action="store_true", help="the fleets of workers alone")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "parity-full.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console, began_s = Console(stderr=True), time.monotonic()
    rows: list[dict[str, object]] = []
    for network in arguments.network:
        for row in _served(network) if arguments.served else chain(_stepped(network, console), _served(network)):
            rows.append(row)
            state = "identical" if row["is_identical"] else "[red]OTHER TOKENS[/red]"
            how = f"{row['by']}, prompts by {row['prompts_by']}, then {row['then_by']}"
            console.print(f"{network}, {how}: {state}")
    identical = sum(bool(row["is_identical"]) for row in rows)
    report = {
        "machine": machine(),
        "command": sys.argv,
        "combos": len(rows),
        "combos_identical": identical,
        "tokens_each": _NUM_TOKENS * len(_LENGTHS),
        "rows": rows,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"{identical} of {len(rows)} identical in {time.monotonic() - began_s:.0f} s; {arguments.json}")
    raise SystemExit(identical < len(rows))


def _stepped(network: str, console: Console) -> Iterator[dict[str, object]]:
    """Yield the rows of models that are stepped here, without workers."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), TINY_CONFIGS[network])
        prompts = _telling_prompts(Oracle(Path(folder)))
        margin = min(prompt.margin for prompt in prompts)
        console.print(f"{network}: the smallest difference of two best logits is {margin:.4f}")
        yield from _rows(Path(folder), network, prompts)


def _rows(folder: Path, network: str, prompts: list[Prompt]) -> list[dict[str, object]]:
    """Return a row for each pair of layouts of as many ranks; a layout that has several names is computed once."""
    names = {(attention, experts): ParallelLayout.parse(attention, experts)
             for attention in _ATTENTION for experts in _EXPERTS}  # fmt: skip
    rows: list[dict[str, object]] = []
    for size in sorted({layout.size for layout in names.values()}):
        once = {layout: name for name, layout in reversed(names.items()) if layout.size == size}
        layouts = [ONE_PROCESS, *once.values()]
        inputs = [prompt.token_ids for prompt in prompts]
        found = run_ranks(size, hand_off_all, folder, layouts, inputs, _NUM_TOKENS)
        expected = [prompt.output for prompt in prompts]
        rows += [
            {
                "network": network,
                "by": "models",
                "ranks": size,
                "prompts_by": _said(*pair[0], names),
                "then_by": _said(*pair[1], names),
                "is_identical": all(of_rank[pair] == expected for of_rank in found),
            }
            for pair in found[0]
            if pair != (ONE_PROCESS, ONE_PROCESS)
        ]
    return rows


def _served(network: str) -> Iterator[dict[str, object]]:
    """Yield a row for each fleet of workers: its answers to prompts, and to each with its answer and some more."""
    with tempfile.TemporaryDirectory() as folder:
        write_served(Path(folder), network, ROOT / "demo" / "model")
        oracle = Oracle(Path(folder))
        prompts = [prompt.token_ids for prompt in _telling_prompts(oracle)]
        first = Turns(prompts, [oracle.greedy(prompt, _NUM_TOKENS) for prompt in prompts])
        longer = [[*prompt, *output, *prompt[:9]] for prompt, output in zip(*first, strict=True)]
        second = Turns(longer, [oracle.greedy(prompt, _NUM_TOKENS) for prompt in longer])
        for prefill, decode, is_identical in serve_all(Path(folder), first, second):
            names = ["one process" if of_side == ONE_PROCESS else "/".join(of_side) for of_side in (prefill, decode)]
            yield {
                "network": network,
                "by": "workers",
                "prompts_by": names[0],
                "then_by": names[1],
                "is_identical": is_identical,
            }


def _said(attention: str, experts: str, names: dict[tuple[str, str], ParallelLayout]) -> str:
    """Return all names of a layout."""
    if (attention, experts) == ONE_PROCESS:
        return "one process"
    layout = names[attention, experts]
    return " = ".join(f"{a}/{e}" for (a, e), other in names.items() if other == layout)


def _telling_prompts(oracle: Oracle) -> list[Prompt]:
    return [_telling_prompt(oracle, length) for length in _LENGTHS]


def _telling_prompt(oracle: Oracle, length: int) -> Prompt:
    for seed in range(1000):
        prompt = random.Random(seed).choices(range(3, 160), k=length)
        output = oracle.greedy(prompt, _NUM_TOKENS)
        best = oracle.logits(prompt + output[:-1])[length - 1 :].topk(2, dim=-1).values
        margin = float((best[:, 0] - best[:, 1]).min())
        if len(set(output)) >= _LEAST_DIFFERENT and margin >= _LEAST_MARGIN:
            return Prompt(prompt, output, margin)
    raise AssertionError(f"no prompt of {length} tokens tells anything")


if __name__ == "__main__":
    main()
