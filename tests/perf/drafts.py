"""What `--speculate` gains the demo model: right guesses, tokens a step, time of a token, beside plain decoding.

    PYTHONPATH=demo python -m tests.perf.drafts [--speculate lookup mtp:1] [--prompts 100] [--workload stories]
        [--at-a-time 1 4 8] [--temperature 0 0.7] [--max-rows 16] [--json build/bench/drafts.json]

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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from headrace_core.config import DecodeSettings
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
_WARM_TOKENS = 40


def workloads(num_prompts: int, wanted: Sequence[str] = WORKLOADS) -> dict[str, list[list[int]]]:
    """Return the prompts of each that is wanted."""
    prompts = token_ids(make_prompts(num_prompts), FOLDER)
    if "told again" not in wanted:
        return {"stories": prompts}
    greedy = [SamplingParams(temperature=0.0, seed=0, max_tokens=_MAX_TOKENS)] * num_prompts
    told = Decoding(load_model(FOLDER), max_sequences=16).run(prompts, greedy).outputs
    told_again = [prompt + told[i] + prompt for i, prompt in enumerate(prompts)]
    return dict(zip(WORKLOADS, (prompts, told_again), strict=True))


def compared(
    prompts: list[list[int]], *, at_a_time: int, temperature: float, speculation: Speculation
) -> dict[str, Any]:
    """Return the figures of one row of the table."""
    num_prompts = len(prompts)
    decoding = Decoding(load_model(FOLDER, has_mtp=speculation.is_mtp), max_sequences=at_a_time)
    for kind in (NO_DRAFTS, speculation):  # steps are recorded
        warm = [SamplingParams(temperature=0.0, seed=0, max_tokens=_WARM_TOKENS)] * at_a_time
        decoding.run(prompts[:at_a_time], warm, kind)
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


def mtp_tokens_per_step(num_prompts: int = 20) -> dict[str, Any]:
    """Return the row of stories told one at a time, greedily, with guesses of the model's own module.

    Its `tokens_per_row` are `mtp_tokens_per_step` of `build/bench/parallel.json`: a count, which no load changes.
    """
    prompts = token_ids(make_prompts(num_prompts), FOLDER)
    return compared(prompts, at_a_time=1, temperature=0.0, speculation=Speculation(1, 8, "mtp"))


def main() -> None:
    """Print a row for each kind of drafts and number of sequences at a time, greedy and drawn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--workload", choices=WORKLOADS, nargs="*", default=WORKLOADS)
    parser.add_argument("--speculate", nargs="*", default=["lookup"], metavar="METHOD[:K]")
    parser.add_argument("--at-a-time", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--temperature", type=float, nargs="*", default=[0.0, 0.7])
    parser.add_argument("--max-rows", type=int, default=0, help="0: as many as a worker takes")
    parser.add_argument("--json", type=Path, default=Path("build/bench/drafts.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    prompts = workloads(options.prompts, options.workload)
    cells = itertools.product(options.speculate, options.workload, options.at_a_time, options.temperature)
    for asked, name, at_a_time, temperature in cells:
        speculation = Speculation.of(DecodeSettings(model=FOLDER, speculate=asked))
        speculation = replace(speculation, max_rows=options.max_rows or speculation.max_rows)
        row = compared(prompts[name], at_a_time=at_a_time, temperature=temperature, speculation=speculation)
        rows.append({"workload": name, "speculate": asked, "max_rows": speculation.max_rows} | row)
        sys.stdout.write(
            f"{asked}, {name}, {at_a_time} at a time, temperature {temperature}: "
            f"{row['same']} of {row['prompts']} the same, "
            f"{row['acceptance']:.1%} right, {row['tokens_per_row']:.2f} tokens a row, "
            f"{row['plain_us_per_token']:.0f} → {row['drafted_us_per_token']:.0f} µs a token, "
            f"median of pairs {row['speed_up_median']:.2f} times\n"
        )
        sys.stdout.flush()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
