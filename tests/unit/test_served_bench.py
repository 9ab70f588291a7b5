"""The served bench: how it times an answer, and what it makes of both sides' figures."""

import asyncio

import pytest
from headrace_client.bench.target import Answered

from tests.perf.closed_loop import asking_target
from tests.perf.served.summary import ratios, table


class _Target:
    """Answers with tokens that come 1 and then 2 at a time."""

    async def ask(self, prompt, num_output, on_tokens):
        on_tokens(1)
        on_tokens(2)
        return Answered(len(prompt))

    async def close(self):
        pass


def test_each_token_of_an_answer_is_timed():
    times = asyncio.run(asking_target(_Target(), 3)([5, 6]))
    assert [count for _, count in times.deltas] == [1, 2]


def test_an_answer_that_is_too_short_is_an_error():
    with pytest.raises(RuntimeError, match="3 tokens of 4"):
        asyncio.run(asking_target(_Target(), 4)([5, 6]))


def _cell(rate, ttft, itl):
    times = {"p50": 1.0}
    return {
        "tokens_per_s": rate,
        "ttft_ms": times | {"p99": ttft},
        "itl_ms": times | {"p99": itl},
        "cpu_s_per_1000_tokens": 5.0,
    }


def test_ratios_are_ours_to_theirs_and_null_without_them():
    cells = {"both": {8: _cell(30.0, 50.0, 20.0)}, "vllm": {8: _cell(20.0, 100.0, 80.0)}}
    assert ratios(cells) == {
        "both_c8_tokens_per_s_vs_vllm": 1.5,
        "both_c8_itl_p99_vs_vllm": 0.25,
        "both_c8_ttft_p99_vs_vllm": 0.5,
    }
    assert set(ratios({"both": cells["both"]}).values()) == {None}
    assert "8, vllm" in table({"cells": cells, "not_measured": {}})
