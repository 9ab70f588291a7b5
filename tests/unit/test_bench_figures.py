"""What `headrace bench` makes of what clients saw."""

import re
from pathlib import Path

import pytest
from headrace_client.bench.block import block
from headrace_client.bench.compare import cautions, differences, table
from headrace_client.bench.figures import figures_of, throughput, tokens_per_second
from headrace_client.bench.goodput import parse_goodput
from headrace_client.bench.page import page
from headrace_client.bench.record import Record
from headrace_client.bench.report import Run, encode_report, read_report
from headrace_core.errors import InvalidRequestError

DOC = (Path(__file__).parents[2] / "docs/metrics.md").read_text()


def record(index, *deltas, intended=0.0, sent=None, num_prompt=10, num_cached=None, error=""):
    end = deltas[-1][0] if deltas else intended
    return Record(index, intended, intended if sent is None else sent, list(deltas), end, num_prompt, num_cached, error)


def answers(count, gap, first=0.1, every=0.5):
    """So many answers of 11 tokens, one each `gap` s, that begin `every` s after each other."""
    return [
        record(i, *((i * every + first + place * gap * (1 + i % 3 / 10), 1) for place in range(11)), intended=i * every)
        for i in range(count)
    ]


def test_every_latency_counts_from_when_the_request_was_due():
    late = record(0, (5.0, 1), (5.5, 2), intended=1.0, sent=4.0)
    assert (late.ttft_s, late.e2el_s, late.tpot_s) == (4.0, 4.5, 0.25)
    assert late.itls_s() == [0.25, 0.25]
    assert figures_of([late])["max_send_delay_ms"] == 3000.0


def test_a_published_panel_s_rates_come_out_of_its_counts():
    # 45.91 req/s, 9,748.52 output tok/s and 21,443.31 in all, of 4,096 requests with 869,796 tokens out.
    duration_s = 869_796 / 9_748.52
    rates = throughput(duration_s, 4096, 1_043_449, 869_796)
    assert f"{rates['request_throughput']:.2f}" == "45.91"
    assert f"{rates['output_throughput']:.2f}" == "9748.52"
    assert rates["total_token_throughput"] == pytest.approx(21_443.31, abs=0.02)
    # With the 1,843,441 tokens in that it prints, the total would be another one.
    assert round(throughput(duration_s, 4096, 1_843_441, 869_796)["total_token_throughput"]) == 30_409


def test_the_two_averages_of_the_worked_example():
    short = record(0, (1.0, 1), (1.1, 1))  # one gap of 100 ms
    long = record(1, *((1.0 + 0.02 * place, 1) for place in range(10)))  # nine gaps of 20 ms
    figures = figures_of([short, long])
    assert (round(figures["mean_itl_ms"], 3), round(figures["mean_tpot_ms"], 3)) == (28.0, 60.0)
    assert "28 ms" in DOC
    assert "60 ms" in DOC


def test_counts_and_peaks():
    records = [
        record(0, (0.5, 1), (1.5, 4), num_cached=5),
        record(1, (1.2, 1), (3.9, 2), intended=0.2, num_cached=0),
        record(2, intended=2.0, error="QUEUE_FULL"),
    ]
    figures = figures_of(records, parse_goodput("ttft:600"))
    assert (figures["completed"], figures["failed"], figures["errors"]) == (2, 1, {"QUEUE_FULL": 1})
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (20, 8)
    assert tokens_per_second(records) == [1, 5, 0, 2]
    assert (figures["max_output_tokens_per_s"], figures["max_concurrent_requests"]) == (5, 2)
    assert figures["duration"] == 3.9
    assert figures["request_goodput"] == pytest.approx(1 / 3.9)
    assert figures["prefix_hit_rate"] == 0.25


def test_a_run_of_failures_has_no_latencies_and_says_so():
    figures = figures_of([record(0, error="UNREACHABLE")])
    assert figures["mean_ttft_ms"] is None
    shown = block(figures, {})
    assert re.search(r"Mean TTFT \(ms\): +-$", shown, re.MULTILINE)
    assert shown.endswith("failed with UNREACHABLE: 1")


def test_the_block_is_the_field_s():
    lines = block(figures_of(answers(10, 0.02)), {"concurrency": 4, "rate": 2.0}).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert set(lines[-1]) == {"="}
    labels = [line.partition(":")[0] for line in lines]
    for label in (
        "Successful requests", "Failed requests", "Maximum request concurrency", "Request rate configured (RPS)",
        "Benchmark duration (s)", "Total input tokens", "Total generated tokens", "Request throughput (req/s)",
        "Output token throughput (tok/s)", "Peak output token throughput (tok/s)", "Peak concurrent requests",
        "Total token throughput (tok/s)", "Mean TTFT (ms)", "Median TPOT (ms)", "P25 ITL (ms)", "P99 E2EL (ms)",
    ):  # fmt: skip
        assert label in labels
    assert "---------------Time to First Token----------------"[:50] in lines
    assert "Successful requests:                     10" in lines


@pytest.mark.parametrize("text", ["ttft", "ttft:x", "speed:5", "ttft:-1", "ttft:inf", ""])
def test_objectives_that_make_no_sense_are_refused(text):
    with pytest.raises(InvalidRequestError, match="goodput"):
        parse_goodput(text)


def test_itl_s_objective_is_of_a_request_s_own_99th_percentile():
    steady, stalls = record(0, *((i * 0.02, 1) for i in range(50))), record(1, (0.0, 1), (0.02, 1), (0.5, 1))
    goodput = parse_goodput("itl:50")
    assert [goodput.is_met_by(each) for each in (steady, stalls)] == [True, False]


def test_a_report_is_read_as_it_was_written(tmp_path):
    import json

    records = [*answers(3, 0.02), record(3, intended=1.0, error="QUEUE_FULL")]
    run = Run({"dataset": "random"}, figures_of(records), records)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(encode_report([run], command="headrace bench", target="x:1")))
    (read,) = read_report(path)
    assert [each.error for each in read.records] == ["", "", "", "QUEUE_FULL"]
    assert figures_of(read.records)["mean_itl_ms"] == pytest.approx(run.figures["mean_itl_ms"], abs=1e-3)


@pytest.mark.parametrize("content", ["", "{}", '{"headrace_bench": 9, "runs": []}', "[]"])
def test_what_is_no_report_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(InvalidRequestError, match="no report"):
        read_report(path)


def _run(records):
    return Run({}, figures_of(records), records)


def test_the_same_run_twice_shows_no_difference_and_a_slower_one_does():
    same = differences(_run(answers(60, 0.020)), _run(answers(60, 0.020)))
    assert not any(each.is_certain for each in same)
    found = {each.name: each for each in differences(_run(answers(60, 0.020)), _run(answers(60, 0.030)))}
    assert found["mean_itl_ms"].is_certain
    assert found["mean_itl_ms"].ratio == pytest.approx(1.5)
    assert found["mean_itl_ms"].low < 1.5 < found["mean_itl_ms"].high
    assert not found["mean_ttft_ms"].is_certain
    assert "no difference seen" in table(list(found.values()))


def test_gaps_of_one_answer_are_drawn_together():
    # Two kinds of answers, one twice as slow: with 10 gaps each, drawing gaps would promise a third of the width.
    records = [record(i, *((place * (0.02 + 0.02 * (i % 2)), 1) for place in range(11))) for i in range(20)]
    (itl,) = [each for each in differences(_run(records), _run(records)) if each.name == "mean_itl_ms"]
    assert itl.high - itl.low > 0.3


def test_the_page_needs_nothing_else():
    made = page([_run([*answers(300, 0.02), record(300, error="<b>")])], title="a < b", command="headrace bench")
    assert made.count("<svg") == 3
    assert "a &lt; b" in made
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)", made)
    assert "NaN" not in made
    assert "nan" not in made.partition("</style>")[2]


def test_a_report_of_an_older_version_is_read(tmp_path):
    import json

    records = answers(2, 0.02)
    content = encode_report([Run({}, figures_of(records), records)], command="", target="x:1")
    for request in content["runs"][0]["requests"]:
        del request[8:]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert len(read_report(path)[0].records) == 2


def test_what_makes_two_runs_incomparable_is_said_before_their_figures():
    failed = [*answers(5, 0.02), record(5, error="QUEUE_FULL")]
    first = Run({"dataset": "random", "rate": 2.0}, figures_of(failed), failed)
    cut = {"under_way": 1, "not_sent": 0}
    figures = {**figures_of(answers(5, 0.02)), "interrupted": cut}
    stopped = Run({"dataset": "reasoning", "rate": 2.0}, figures, answers(5, 0.02))
    assert cautions(first, stopped) == [
        "not the same: dataset is random in A, reasoning in B",
        "1 of 6 requests of A failed, and are in no latency",
        "B was interrupted",
    ]
    assert cautions(first, first)[0].startswith("1 of 6")
