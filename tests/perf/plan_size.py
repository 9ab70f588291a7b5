"""How large a step's plan is as a diff, and what it costs: `python -m tests.perf.plan_size` (`make bench-plan`).

256 sequences of 4,096 tokens decode for 200 steps, each with penalties; in every fourth step one ends and another
joins, whose bytes are counted apart. Schedulers, differ, messages and books are the product's; tokens are made up.
Beside it the whole plan as pickle writes it. Microseconds are of the thread's CPU. Prints the figures and
writes build/bench/plan-size.json.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from headrace_core.batch.executor_book import ExecutorBook
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import StepResult
from headrace_core.batch.step_diff import Differ
from headrace_core.engine.plan_messages import decode, encode
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken, SamplingParams
from headrace_decode.scheduler import DecodeScheduler

from tests.perf.machine import machine
from tests.perf.report_file import merge

_log = logging.getLogger(__name__)
_REPORT = Path("build/bench/plan-size.json")
_SEQUENCES, _TOKENS, _STEPS, _STEPS_PER_JOIN = 256, 4096, 200, 4
_TOKEN = SampledToken(7)


def measure(page_size: int) -> dict[str, Any]:
    """Return bytes and microseconds with pages of so many tokens."""
    scheduler = DecodeScheduler(
        PageAllocator(_SEQUENCES * (_TOKENS + 400) // page_size, page_size),
        ModelLimits(1 << 20, 1 << 20, ()),
        max_step_tokens=_SEQUENCES,
        max_step_sequences=_SEQUENCES,
        max_waiting_sequences=_SEQUENCES,
    )
    keys: list[int] = []

    def add() -> None:
        key = keys[-1] + 1 if keys else 1
        params = SamplingParams(seed=key, max_tokens=1 << 19, presence_penalty=0.5)
        tokens = [(key * 31 + i * 7) % 50_000 for i in range(_TOKENS)]
        scheduler.add(key, SequenceSpec(f"request-{key}", 1, 0, tokens, _TOKENS, params), 0.0, has_handoff=True)
        scheduler.admit(0.0)
        scheduler.arrived(key, 9)
        keys.append(key)

    for _ in range(_SEQUENCES):
        add()
    differ, book = Differ(), ExecutorBook("rank 0")
    sizes, join_bytes, told_us, read_us, whole = [], [], [], [], 0
    for number in range(_STEPS + 1):
        if number and number % _STEPS_PER_JOIN == 0:
            scheduler.abort(keys[number // _STEPS_PER_JOIN])
            add()
        plan = scheduler.plan(0.0)
        assert plan is not None, "all of them run"
        running = {chunk.key for chunk in plan.chunks}
        begun_s = time.thread_time()
        diff = differ.diff(plan, running)
        message = encode(diff)
        encoded_s = time.thread_time()
        book.plan(decode(message))
        ended_s = time.thread_time()
        rest = [r._replace(first_page=-1, page_ids=(), token_ids=()) if r.key in diff.names else r for r in diff.rows]
        size = len(encode(dataclasses.replace(diff, names={}, joins=(), rows=rest)))
        if diff.names:
            join_bytes.append((len(message) - size) / len(diff.names))
        if number:
            sizes.append(size)
            told_us.append((encoded_s - begun_s) * 1e6)
            read_us.append((ended_s - encoded_s) * 1e6)
        else:
            whole = len(pickle.dumps(plan))
        tokens = {key: [_TOKEN] for key in running}
        book.sampled({key: [_TOKEN.token_id] for key in running})
        scheduler.apply(StepResult(tokens, 0.0), 0.0)
        scheduler.take_events()
    return {
        "mean_bytes": round(statistics.mean(sizes)),
        "max_bytes": max(sizes),
        "bytes_of_a_join": round(statistics.mean(join_bytes)),
        "pickled_whole_plan_bytes": whole,
        "diff_and_encode_us": round(statistics.median(told_us)),
        "decode_and_book_us": round(statistics.median(read_us)),
    }


def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    report = {"machine": machine(), **{f"pages of {size}": measure(size) for size in (16, 64)}}
    merge(_REPORT, report)
    for name, figures in report.items():
        _log.info("%s: %s", name, figures)


if __name__ == "__main__":
    _main()
