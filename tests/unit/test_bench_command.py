"""`headrace bench` against a scripted router."""

import asyncio
import json
import resource
import signal
import socket
import subprocess
import sys
import threading

import pytest
from headrace_client.commands.app import app
from headrace_core.errors import OverloadedError
from headrace_core.testing.async_test import WAIT_S, eventually
from headrace_core.testing.fake_router import FakeRouter, Hold, answer
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--time-scale", "2"), "--time-scale has no effect here: it belongs to --trace"),
        (("--trace", "x.jsonl", "--input-tokens", "5"), "--input-tokens has no effect here"),
        (("--trace", "x.jsonl", "--dataset", "random"), "--dataset has no effect here"),
        (("--turns", "3"), "--dataset multi-turn"),
        (("--prefixes", "3"), "--dataset shared-prefix"),
        (("--burstiness", "2", "--concurrency", "2"), "--request-rate"),
        (("--chat",), "--base-url"),
        (("--no-continuous-usage",), "--base-url"),
        (("--base-url", "x:1", "--server", "y:1"), "gRPC"),
        (("--request-rate", "1", "--burstiness", "nan"), "--burstiness"),
        (("--range-ratio", "nan"), "--range-ratio"),
        (("--length-scale", "nan"), "--length-scale"),
        (("--request-rate", "nan"), "'nan'"),
        (("--concurrency", "inf"), "whole"),
        (("--request-rate", "1e-9"), "days"),
        (("--input-tokens", "0"), "--input-tokens"),
        (("--output-tokens", "100000000000"), "--output-tokens"),
        (("--num-requests", "100000000000"), "--num-requests"),
        (("--json", "/nowhere/a.json"), "can't write /nowhere/a.json"),
        (("--html", "/"), "folder"),
    ],
)
def test_what_would_not_be_heeded_or_makes_no_sense_is_refused_before_anything_is_asked(arguments, says):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in " ".join(result.stderr.split())


def test_a_report_is_json_whatever_the_burstiness(tmp_path):
    out = tmp_path / "a.json"
    with FakeRouter([*answer("Once", " upon")]) as router:
        options = ["--num-requests", "3", "--output-tokens", "2", "--request-rate", "1000", "--burstiness", "inf"]
        result = run(*options, "--json", str(out), "-s", router.address)
    assert result.exit_code == 0, result.stderr

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    report = json.loads(out.read_text(), parse_constant=no_constant)
    assert report["runs"][0]["setting"]["burstiness"] == "even"


def test_why_requests_failed_is_said_in_words_warm_ups_too():
    with FakeRouter([OverloadedError("QUEUE_FULL", "the queue of 7 is full")]) as router:
        result = run("--num-requests", "3", "--warm-up", "1", "--input-tokens", "8", "-s", router.address)
    said = " ".join(result.stderr.split())
    assert "error: QUEUE_FULL: the queue of 7 is full" in said
    assert "warming up: QUEUE_FULL: the queue of 7 is full" in said
    assert result.exit_code == 1


def test_answers_that_are_too_short_are_said():
    with FakeRouter([*answer("Once", " upon")]) as router:
        result = run("--num-requests", "3", "--input-tokens", "8", "--output-tokens", "5", "-s", router.address)
    assert "answered with fewer tokens than asked for: 3" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_says_and_writes_what_was_answered(tmp_path, number):
    out, html = tmp_path / "a.json", tmp_path / "a.html"
    with FakeRouter(answer("Once", " upon"), answer("Once", " upon"), [Hold.UNTIL_CANCELLED]) as router:
        options = ["--num-requests", "9", "--input-tokens", "8", "--output-tokens", "2", "--concurrency", "1,2"]
        files = ["--json", str(out), "--html", str(html)]
        command = [sys.executable, "-m", "headrace_client", "bench", *options, *files, "-s", router.address]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            asyncio.run(eventually(lambda: len(router.requests) == 3, "the third request"))
            child.send_signal(number)
            stdout, stderr = child.communicate(timeout=WAIT_S)
        finally:
            child.kill()
    assert child.returncode == 128 + number, stderr
    assert "Successful requests:                     2" in stdout
    assert "interrupted: 1 requests were under way, 6 not sent; none of them counts" in stdout
    assert stdout.count("Serving Benchmark Result") == 1, "the other level is not begun"
    (only,) = json.loads(out.read_text())["runs"]
    assert only["figures"]["interrupted"] == {"under_way": 1, "not_sent": 6}
    assert (only["figures"]["completed"], only["figures"]["failed"], len(only["requests"])) == (2, 0, 2)
    assert "interrupted: 1 requests" in html.read_text()
    assert "Traceback" not in stderr


async def _bench_with_few_files(num_at_once):
    """Return what a bench says that may open 64 files at first, of a server that answers when all have come."""
    everybody = asyncio.Barrier(num_at_once)
    body = (
        b'data: {"choices": [{"text": "a"}], "usage": {"prompt_tokens": 4, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'
    )

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
        await everybody.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with await asyncio.start_server(serve, "127.0.0.1", 0, backlog=num_at_once) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        options = ["--model", "m", "--num-requests", str(num_at_once), "--input-tokens", "4", "--output-tokens", "1"]
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "headrace_client", "bench", "--base-url", url, *options, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, most)),
        )  # fmt: skip
        async with asyncio.timeout(WAIT_S):
            stdout, stderr = await child.communicate()
    return stdout.decode(), stderr.decode()


def test_as_many_connections_are_opened_as_the_system_allows():
    stdout, stderr = asyncio.run(_bench_with_few_files(150))
    assert "Successful requests:                     150" in stdout, stderr


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--base-url", "http://127.0.0.1:1"), "name another with --base-url URL."),
        (("--server", "127.0.0.1:1"), "name another with --server HOST:PORT."),
    ],
)
def test_a_server_that_is_not_there_is_said_with_the_option_that_named_it(options, names):
    result = run(*options, "--num-requests", "1")
    assert result.exit_code == 1
    assert "no connection to" in result.stderr
    assert result.stderr.rstrip().endswith(names)


def test_a_server_over_http_that_hangs_up_is_not_looked_for_with_headrace_status():
    """It may be anybody's: `headrace status` asks a router over gRPC."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closer = threading.Thread(target=lambda: server.accept()[0].close())
        closer.start()
        result = run("--base-url", f"127.0.0.1:{server.getsockname()[1]}", "--num-requests", "1")
        closer.join()
    assert result.exit_code == 1
    assert result.stderr == "error: the server closed the connection before its answer's end\n"
