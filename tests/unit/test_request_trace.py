"""Recorded traces: any order and any origin of time will do; what makes no sense is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from headrace_core.errors import InvalidRequestError
from headrace_core.request_trace import load_trace

LINE = {"timestamp": 1000, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}


def trace(folder: Path, *rows: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_times_count_from_the_earliest_whatever_they_began_at(tmp_path):
    rows = [{**LINE, "timestamp": at, "output_length": 2000 + at} for at in (4000, -1000, 0)]
    workload = load_trace(trace(tmp_path, *rows))
    assert workload.arrival_s.tolist() == [0.0, 1.0, 5.0]
    assert workload.num_output.tolist() == [1000, 2000, 6000]
    since_1970 = load_trace(trace(tmp_path, {**LINE, "timestamp": 1_790_000_000_000}))
    assert since_1970.arrival_s.tolist() == [0.0], "nobody waits for the year 2026"


def test_lengths_of_zero_become_one_and_empty_lines_are_nothing(tmp_path):
    workload = load_trace(trace(tmp_path, "", {**LINE, "input_length": 0, "output_length": 0}, "  "))
    assert (workload.num_prompt.tolist(), workload.num_output.tolist()) == ([1], [1])


def test_hashes_may_be_signed_and_large(tmp_path):
    workload = load_trace(trace(tmp_path, {**LINE, "hash_ids": [-1, 2**63]}))
    assert workload.blocks == [(2**64 - 1, 2**63)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**LINE, "timestamp": float("nan")}, "time nan"),
        ({**LINE, "timestamp": float("inf")}, "time inf"),
        ({**LINE, "input_length": -5}, "length -5"),
        ({**LINE, "output_length": 10**12}, "length 1000000000000"),
        ({**LINE, "input_length": float("inf")}, "infinity"),
        ({**LINE, "hash_ids": ["x"]}, "'x'"),
        ({"timestamp": 0, "input_length": 5}, "output_length"),
        ("[1, 2]", "TypeError"),
        ("{", "JSONDecodeError"),
        ("[" * 100_000, "Recursion"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, row, says):
    with pytest.raises(InvalidRequestError, match=f"line 3: .*{says}"):
        load_trace(trace(tmp_path, LINE, LINE, row, LINE))


def test_a_trace_of_nothing_is_refused(tmp_path):
    with pytest.raises(InvalidRequestError, match="no requests"):
        load_trace(trace(tmp_path, ""))
    with pytest.raises(InvalidRequestError, match="no file"):
        load_trace(tmp_path / "none.jsonl")


def test_a_table_s_line_is_named_too(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16,x,1\n")
    with pytest.raises(InvalidRequestError, match=r"line 3: .*'x'"):
        load_trace(path)
