"""What `--speculate lookup` gains the demo model: right guesses, tokens a step, time of a token, beside plain decoding.

    PYTHONPATH=demo python -m tests.perf.drafts [--prompts 100] [--workload stories] [--json build/bench/drafts.json]

Of *stories* the prompts are those of the demo model's gate; *told again* has the prompt, the story, and the prompt once
more, as a conversation has its earlier turns. Each is gone on with to its end, so many at a time as said. Both kinds
take turns of ten prompts each, the first of a pair by turns; times are CPU time of decode steps, on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from headrace_core.model.load import load_model
from headrace_core.request import SamplingParams
from headrace_decode.speculation import NO_DRAFTS, Speculation
from headrace_demo.evaluate import make_prompts

from tests.parity.decoding import Decoded, Decoding
from tests.perf.eight_bits import token_ids

FOLDER = Path("demo/model")
WORKLOADS = ("stories", "told again")
_TURN = 10
_MAX_TOKENS = 320


def workloads(num_prompts: int) -> dict[str, list[list[int]]]:
    """Return the prompts of each."""
    prompts = token_ids(make_prompts(num_prompts), FOLDER)
    greedy = [SamplingParams(temperature=0.0, seed=0, max_tokens=_MAX_TOKENS)] * num_prompts
    told = Decoding(load_model(FOLDER), max_sequences=16).run(prompts, greedy).outputs
    told_again = [prompt + told[i] + prompt for i, prompt in enumerate(prompts)]
    return dict(zip(WORKLOADS, (prompts, told_again), strict=True))


def compared(
    prompts: list[list[int]], *, at_a_time: int, temperature: float, speculation: Speculation
) -> dict[str, Any]:
    """Return the figures of one row of the table."""
    num_prompts = len(prompts)
    decoding = Decoding(load_model(FOLDER), max_sequences=at_a_time)
    kinds = (NO_DRAFTS, speculation)
    totals = (Decoded(), Decoded())
    ratios: list[float] = []
    num_same = 0
    for turn, first in enumerate(range(0, num_prompts, _TURN)):
        some = prompts[first : first + _TURN]
        params = [SamplingParams(temperature=temperature, seed=i, max_tokens=_MAX_TOKENS) for i in range(len(some))]
        runs: dict[int, Decoded] = {}
        for which in (0, 1) if turn % 2 else (1, 0):
            run = runs[which] = decoding.run(some, params, kinds[which])
            total = totals[which]
            total.num_rows += run.num_rows
            total.num_drafted += run.num_drafted
            total.num_right += run.num_right
            total.seconds += run.seconds
        ratios.append(runs[0].seconds / runs[1].seconds)
        num_same += sum(runs[0].outputs[key] == runs[1].outputs[key] for key in runs[0].outputs)
    plain, drafted = totals
    return {
        "at_a_time": at_a_time,
        "temperature": temperature,
        "prompts": num_prompts,
        "same": num_same,
        "tokens": plain.num_tokens,
        "acceptance": drafted.num_right / max(drafted.num_drafted, 1),
        "drafted_per_row": drafted.num_drafted / drafted.num_rows,
        "tokens_per_row": drafted.num_tokens / drafted.num_rows,
        "plain_us_per_token": 1e6 * plain.seconds / plain.num_tokens,
        "drafted_us_per_token": 1e6 * drafted.seconds / drafted.num_tokens,
        "speed_up_median": statistics.median(ratios),
        "speed_ups": ratios,
    }


def main() -> None:
    """Print a row for each number of sequences at a time, greedy and drawn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--workload", choices=WORKLOADS, nargs="*", default=WORKLOADS)
    parser.add_argument("--num-tokens", type=int, default=4)
    parser.add_argument("--max-rows", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path("build/bench/drafts.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    speculation = Speculation(options.num_tokens, options.max_rows)
    prompts = workloads(options.prompts)
    for name, at_a_time, temperature in itertools.product(options.workload, (1, 4), (0.0, 0.7)):
        row = compared(prompts[name], at_a_time=at_a_time, temperature=temperature, speculation=speculation)
        rows.append({"workload": name} | row)
        sys.stdout.write(
            f"{name}, {at_a_time} at a time, temperature {temperature}: {row['same']} of {row['prompts']} the same, "
            f"{row['acceptance']:.1%} right, {row['tokens_per_row']:.2f} tokens a row, "
            f"{row['plain_us_per_token']:.0f} → {row['drafted_us_per_token']:.0f} µs a token, "
            f"median of pairs {row['speed_up_median']:.2f} times\n"
        )
        sys.stdout.flush()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
