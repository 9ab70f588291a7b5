"""`headrace bench` against a scripted router."""

import json

from headrace_client.commands.app import app
from headrace_core.errors import OverloadedError
from headrace_core.testing.fake_router import FakeRouter, answer
from typer.testing import CliRunner


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False, env={"COLUMNS": "140"})


def test_a_bench_asks_over_grpc_and_prints_the_block():
    with FakeRouter([*answer("Once", " upon")]) as router:
        result = run(
            "--num-requests",
            "6",
            "--input-tokens",
            "12",
            "--output-tokens",
            "2",
            "--concurrency",
            "2",
            "-s",
            router.address,
        )
    assert result.exit_code == 0, result.stderr
    assert "Successful requests:                     6" in result.stdout
    assert "Maximum request concurrency:             2" in result.stdout
    assert {len(request.tokens.token_ids) for request in router.requests} == {12}
    sampling = router.requests[0].sampling
    assert (sampling.max_tokens, sampling.ignore_eos, sampling.temperature) == (2, True, 0.0)


def test_levels_ask_other_prompts_and_are_written_with_warm_ups_left_out(tmp_path):
    out, html = tmp_path / "a.json", tmp_path / "a.html"
    options = ["--num-requests", "4", "--input-tokens", "8", "--output-tokens", "2", "--warm-up", "2"]
    with FakeRouter([*answer("Once", " upon")]) as router:
        result = run(*options, "--concurrency", "1,2", "--json", str(out), "--html", str(html), "-s", router.address)
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text())
    assert [(each["setting"]["concurrency"], each["figures"]["completed"]) for each in report["runs"]] == [
        (1, 4),
        (2, 4),
    ]
    assert len(router.requests) == 12
    assert len({tuple(request.tokens.token_ids) for request in router.requests}) == 10  # warm-ups ask the same
    assert html.read_text().count("<svg") == 6
    compared = run("compare", str(out), str(out))
    assert compared.exit_code == 0
    assert "mean_ttft_ms" in compared.stdout


def test_requests_that_are_refused_are_counted_by_reason_and_a_bench_of_these_fails():
    with FakeRouter([OverloadedError("QUEUE_FULL", "full")]) as router:
        result = run("--num-requests", "3", "--input-tokens", "8", "-s", router.address)
    assert result.exit_code == 1
    assert "failed with QUEUE_FULL: 3" in result.stdout
    assert len(router.requests) == 3, "nothing is sent again"


def test_options_that_make_no_sense_are_one_line(tmp_path):
    for arguments, says in [
        (("--dataset", "sharegpt"), "none of"),
        (("--goodput", "speed:1"), "speed:1"),
        (("--trace", str(tmp_path / "none.jsonl")), "no file"),
        (("compare", str(tmp_path / "a"), str(tmp_path / "b")), "no report"),
    ]:
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert says in result.stderr
