"""The command against a scripted router: what it prints, where, and how it exits."""

import json
import re
import signal
import subprocess
import sys

import pytest
from headrace_client.commands import chat as chat_module
from headrace_client.commands import demo as demo_module
from headrace_client.commands.app import app
from headrace_core.errors import InvalidRequestError, OverloadedError, UnavailableError
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_router import FakeRouter, Hold, answer, default_info
from typer.testing import CliRunner

NOBODY = "127.0.0.1:1"
"""An address at which nothing serves: a port that a server left may be another's by now."""


def run(*arguments: str, **options):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "140"}, **options)


@pytest.mark.parametrize("command", ["up", "generate", "chat", "status", "demo", "doctor", "bench"])
def test_help_of_every_command_shows_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"headrace {command}" in result.stdout


@pytest.mark.parametrize("command", ["roofline", "plan", "simulate"])
def test_help_of_the_planner_s_commands_shows_examples_too(command):
    result = run(command, "-h")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"headrace {command} --" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "problem", "command"),
    [
        (["generate", "-m", "x", "Hi"], "Invalid value for '--max-tokens' / '-m'", "headrace generate"),
        (["up"], "Missing option '--model'.", "headrace up"),
        (["up", "--model", "x", "--prefill", "-1"], "Invalid value for '--prefill'", "headrace up"),
        (["plan", "--no-such"], "No such option: --no-such", "headrace plan"),
        (["upp"], "No such command 'upp'.", "headrace"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line_and_where_to_look(arguments, problem, command):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    first, second = result.stderr.splitlines()
    assert first.startswith(f"error: {problem}")
    assert second == f"`{command} --help` lists the options."


@pytest.mark.parametrize(
    "arguments", [["roofline", "--model", "nope"], ["plan", "--workload", "x"], ["simulate", "--workload", "1,2"]]
)
def test_the_planner_s_commands_complain_as_the_others_do(arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: '")


def listed() -> list[str]:
    """Return the subcommands of the help, in its order."""
    return re.findall(r"^  ([a-z]+)  ", run("--help").stdout, re.MULTILINE)


def test_subcommands_are_always_in_the_same_order():
    wanted = "demo doctor up generate chat status top experts bench dashboards certs keys roofline plan simulate"
    assert [name for name in listed() if name in wanted.split()] == wanted.split()


def test_help_and_version_of_the_command_itself():
    assert "demo" in listed()
    assert run("--version").stdout.startswith("headrace ")


def test_generate_streams_text_and_nothing_else_to_standard_output():
    with FakeRouter([*answer("Once", " upon", " a")]) as router:
        result = run("generate", "Tell", "--server", router.address)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Once upon a\n", "")
    assert router.requests[0].text.text == "Tell"
    assert router.requests[0].include_timings is False


def test_generate_sends_every_sampling_option():
    options = {
        "--max-tokens": 9, "--temperature": 0.5, "--top-p": 0.9, "--top-k": 40, "--min-p": 0.1,
        "--repetition-penalty": 1.1, "--presence-penalty": 0.2, "--frequency-penalty": 0.3, "--seed": 5,
        "--min-tokens": 2, "--top-logprobs": 3,
    }  # fmt: skip
    flat = [str(part) for pair in options.items() for part in pair]
    lists = ["--ignore-eos", "--stop", "END", "--stop", "\n\n", "--stop-token-id", "7", "--logit-bias", "42=-5"]
    with FakeRouter() as router:
        result = run("generate", "Tell", *flat, *lists, "--request-id", "mine", "-s", router.address)
    assert result.exit_code == 0, result.stderr
    request = router.requests[0]
    for name, value in options.items():
        assert getattr(request.sampling, name[2:].replace("-", "_")) == pytest.approx(value), name
    assert request.sampling.ignore_eos is True
    assert list(request.sampling.stop_strings) == ["END", "\n\n"]
    assert list(request.sampling.stop_token_ids) == [7]
    assert [(bias.token_id, bias.bias) for bias in request.sampling.logit_bias] == [(42, -5.0)]
    assert request.request_id == "mine"


@pytest.mark.parametrize(("command", "said"), [(["generate", "Tell"], ""), (["chat"], "Tell\n")])
def test_generate_and_chat_say_how_soon_tokens_should_come(command, said):
    with FakeRouter() as router:
        flags = ["--slo-class", "interactive", "--slo-ttft-ms", "500", "--slo-itl-ms", "0", "--priority", "-3"]
        result = run(*command, *flags, "-s", router.address, input=said)
    assert result.exit_code == 0, result.stderr
    level = router.requests[0].service_level
    assert (level.slo_class, level.ttft_ms, level.HasField("itl_ms"), level.itl_ms) == ("interactive", 500, True, 0)
    assert router.requests[0].priority == -3


def test_generate_prints_the_whole_result_as_json():
    with FakeRouter() as router:
        result = run("generate", "Tell", "--json", "--timings", "-s", router.address)
    parsed = json.loads(result.stdout)
    assert parsed["samples"][0]["text"] == "A story."
    assert parsed["samples"][0]["finish_reason"] == "stop"
    assert parsed["samples"][0]["timings"]["total_us"] == 100_000


def test_generate_shows_the_waterfall_on_standard_error():
    with FakeRouter() as router:
        result = run("generate", "Tell", "--timings", "-s", router.address)
    assert result.stdout == "A story.\n"
    for part in ("first token: 10.00 ms", "prefill", "8.00 ms", "80 %", "88.00 ms", "2 pages, 640.0 KiB, by grpc"):
        assert part in result.stderr
    hidden = "480.0 KiB of it came while the prompt was computed: 6.00 ms of moving are in no bar."
    assert hidden in " ".join(result.stderr.split())


def test_generate_shows_several_samples_one_after_the_other():
    script = [*answer("a", "b"), *answer("x", sample_index=1)]
    with FakeRouter(script) as router:
        result = run("generate", "Tell", "-n", "2", "-s", router.address)
    assert result.stdout == "--- sample 0 (stop)\nab\n--- sample 1 (stop)\nx\n"


def test_generate_takes_token_ids_and_conversations():
    with FakeRouter() as router:
        assert run("generate", "--tokens", "1, 2 3", "-s", router.address).exit_code == 0
        assert run("generate", "--chat", "Hi", "-s", router.address).exit_code == 0
    assert list(router.requests[0].tokens.token_ids) == [1, 2, 3]
    assert [(message.role, message.content) for message in router.requests[1].chat.messages] == [("user", "Hi")]


def test_generate_reads_standard_input_less_one_newline():
    with FakeRouter() as router:
        assert run("generate", "-", "-s", router.address, input="Es war\neinmal ü\n\n").exit_code == 0
    assert router.requests[0].text.text == "Es war\neinmal ü\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        ((), None, "PROMPT"),
        (("Tell", "--tokens", "1"), None, "either"),
        (("--tokens", "1 x"), None, "'x' is not a token id"),
        (("",), None, "the prompt is empty"),
        (("-",), b"", "the prompt is empty"),
        (("-",), b"caf\xe9 au lait", "not valid UTF-8: byte 0xe9 at offset 3"),
        (("caf\udce9",), None, "not valid UTF-8: byte 0xe9 at offset 3"),
        (("-",), b"x" * (50 << 20), "larger than 8 MiB"),
        (("Tell", "--top-p", "3"), None, "top_p is 3.0; it must be in [1e-30, 1]"),
        (("Tell", "--logit-bias", "x"), None, "'x' is not ID=BIAS"),
        (("Tell", "--request-id", "a b"), None, "request_id"),
        (("Tell", "--tls-roots", "/nowhere.pem"), None, "/nowhere.pem"),
        (("Tell", "--max-tokens", "many"), None, "--max-tokens"),
    ],
)
def test_wrong_input_exits_with_2_and_says_what_is_wrong(arguments, stdin, says):
    result = run("generate", *arguments, input=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def lacking_decode():
    info = default_info()
    for worker in info.workers:
        if worker.address == "127.0.0.1:1003":
            worker.state, worker.detail = "unreachable", "Connection refused"
    return info


LACKING = "no decode worker is ready; 127.0.0.1:1003 is unreachable (Connection refused), 127.0.0.1:1002 is unreachable"


@pytest.mark.parametrize("command", [["generate", "Tell"], ["chat"]])
def test_a_request_without_a_decode_worker_says_so_while_it_waits_and_ends(command):
    with FakeRouter([Hold.UNTIL_CANCELLED], infos=[lacking_decode()]) as router:
        result = run(*command, "--wait", "1", "-s", router.address, input="Tell\n")
        assert router.cancelled.wait(WAIT_S)
    assert result.exit_code == 1
    said, error, *_ = result.stderr.splitlines()
    assert said.startswith(f"waiting: {LACKING}")
    assert error.startswith(f"error: {LACKING}")
    assert "(given up after " in error


def test_a_text_that_stops_because_the_decode_worker_died_ends_as_well():
    with FakeRouter([next(answer("Once", "!")), Hold.UNTIL_CANCELLED], infos=[lacking_decode()]) as router:
        result = run("generate", "Tell", "--wait", "0", "-s", router.address)
    assert (result.exit_code, result.stdout) == (1, "Once\n")
    assert result.stderr.startswith(f"error: {LACKING}")


def test_the_callers_time_limit_wins_over_the_wait():
    with FakeRouter([Hold.UNTIL_CANCELLED], infos=[lacking_decode()]) as router:
        result = run("generate", "Tell", "--wait", "1000", "--timeout", "1.5", "-s", router.address)
    assert result.exit_code == 1
    assert "error: the time limit passed before anything of the answer came, after 1." in result.stderr


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "soon"])
@pytest.mark.parametrize(
    "line",
    [
        ["generate", "Tell", "--timeout"],
        ["generate", "Tell", "--wait"],
        ["status", "--interval"],
        ["top", "--interval"],
    ],
)
def test_seconds_that_are_none_are_refused(line, value):
    result = run(*line, value, "-s", NOBODY)
    assert (result.exit_code, result.stdout) == (2, "")
    assert line[-1] in result.stderr


def test_a_refusal_by_the_router_exits_with_2():
    with FakeRouter([InvalidRequestError("BAD_TOKEN", "stop_token_ids: 9999 is outside the vocabulary")]) as router:
        result = run("generate", "Tell", "-s", router.address)
    assert result.exit_code == 2
    assert result.stderr == "error: stop_token_ids: 9999 is outside the vocabulary\n"


def test_a_failure_in_the_middle_keeps_the_text_and_exits_with_1():
    with FakeRouter([next(answer("Once", " upon")), UnavailableError("RETRIES_EXHAUSTED", "4 attempts")]) as router:
        result = run("generate", "Tell", "-s", router.address)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "Once\n", "error: 4 attempts\n")


def test_a_router_that_is_not_there_exits_with_1_and_says_how_to_start_one():
    for command in (["generate", "Tell"], ["chat"], ["status"]):
        result = run(*command, "-s", NOBODY)
        assert result.exit_code == 1
        assert f"no connection to a router at {NOBODY}" in result.stderr
        assert "headrace up --model DIR" in result.stderr


def test_a_missing_key_exits_with_1_and_says_where_to_give_it(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("sesame\n")
    with FakeRouter(token="sesame") as router:
        refused = run("status", "-s", router.address)
        accepted = run("status", "-s", router.address, "--api-key-file", str(tmp_path / "key"))
        monkeypatch.setenv("HEADRACE_API_KEY", "sesame")
        also_accepted = run("status", "-s", router.address)
    assert (refused.exit_code, accepted.exit_code, also_accepted.exit_code) == (1, 0, 0)
    assert "HEADRACE_API_KEY" in refused.stderr


def test_a_file_without_a_key_exits_with_2_and_is_named(tmp_path):
    result = run("status", "-s", NOBODY, "--api-key-file", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert str(tmp_path / "none") in result.stderr


def test_ctrl_c_cancels_the_request_and_exits_with_130():
    with FakeRouter([next(answer("Once", " upon")), Hold.UNTIL_CANCELLED]) as router:
        command = [sys.executable, "-m", "headrace_client", "generate", "Tell", "-s", router.address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            assert child.stdout.read(4) == b"Once"
            child.send_signal(signal.SIGINT)
            _, complaint = child.communicate(timeout=WAIT_S)
        assert router.cancelled.wait(WAIT_S)
    assert child.returncode == 130
    assert b"Traceback" not in complaint


def test_status_shows_the_workers():
    with FakeRouter() as router:
        result = run("status", "-s", router.address)
    assert result.exit_code == 0
    for part in (
        "fake-model",
        "0123456789ab",
        "4096 tokens",
        "127.0.0.1:1001",
        "prefill",
        "28 / 128",
        "grpc",
        "shm 1.5 GiB/s",
    ):
        assert part in result.stdout
    assert "127.0.0.1:1002: connection refused" in result.stdout


def test_status_prints_json():
    with FakeRouter() as router:
        parsed = json.loads(run("status", "--json", "-s", router.address).stdout)
    assert [worker["state"] for worker in parsed["workers"]] == ["ready", "ready", "unreachable"]
    assert parsed["workers"][0]["transports"] == ["grpc"]
    assert [worker["transport_in_use"] for worker in parsed["workers"]] == ["", "shm", ""]


@pytest.mark.parametrize("form", [["--json"], []], ids=["json", "table"])
def test_status_watches_until_the_router_fails(form):
    infos = [default_info(), default_info(), OverloadedError("X", "enough"), *[OverloadedError("X", "enough")] * 9]
    with FakeRouter(infos=infos) as router:
        result = run("status", "--watch", "--interval", "0", *form, "-s", router.address)
    assert result.exit_code == 1
    assert "enough" in result.stderr
    if form:
        assert [json.loads(line)["model_name"] for line in result.stdout.splitlines()] == ["fake-model"] * 2


def roles_of(request) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def test_chat_keeps_the_conversation_until_reset():
    with FakeRouter([*answer("Hello", "!")], [*answer("Fine.")], [*answer("Who?")]) as router:
        lines = "Hi\nHow are you?\n\n/help\n/reset\nStill there?\n/exit\nnever sent\n"
        result = run("chat", "--system", "Be kind.", "-s", router.address, input=lines)
    assert result.exit_code == 0, result.stderr
    assert "Hello!\n" in result.stdout
    system = ("system", "Be kind.")
    assert [roles_of(request) for request in router.requests] == [
        [system, ("user", "Hi")],
        [system, ("user", "Hi"), ("assistant", "Hello!"), ("user", "How are you?")],
        [system, ("user", "Still there?")],
    ]


def test_chat_goes_on_after_a_failed_turn_and_forgets_it():
    refusal = InvalidRequestError("PROMPT_TOO_LONG", "5000 tokens do not fit")
    with FakeRouter([refusal], [*answer("Hello")]) as router:
        result = run("chat", "-s", router.address, input="long\nHi\n")
    assert "5000 tokens do not fit" in result.stderr
    assert result.exit_code == 0
    assert roles_of(router.requests[1]) == [("user", "Hi")]


def test_chat_exits_with_the_last_turns_failure():
    with FakeRouter([InvalidRequestError("BAD_REQUEST", "no chat template")]) as router:
        assert run("chat", "-s", router.address, input="Hi\n").exit_code == 2


def test_chat_refuses_input_that_is_not_utf8():
    with FakeRouter() as router:
        result = run("chat", "-s", router.address, input=b"caf\xe9\n")
    assert result.exit_code == 2
    assert "not valid UTF-8" in result.stderr


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(monkeypatch):
    written: list[str] = []

    def interrupt_after_first(text: str) -> None:
        written.append(text)
        if text == "Hello":
            raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "write_text", interrupt_after_first)
    with FakeRouter([next(answer("Hello", "!")), Hold.UNTIL_CANCELLED], [*answer("Yes")]) as router:
        result = run("chat", "-s", router.address, input="Hi\nAgain?\n")
        assert router.cancelled.wait(WAIT_S)
    assert result.exit_code == 0
    assert roles_of(router.requests[1]) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Again?")]


def test_demo_without_its_model_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_module, "__file__", str(tmp_path / "a" / "b" / "c" / "demo.py"))
    result = run("demo")
    assert result.exit_code == 2
    assert "--model" in result.stderr


def test_up_without_a_model_or_with_a_wrong_one_exits_with_2(tmp_path):
    assert run("up").exit_code == 2
    result = run("up", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "config.json" in result.stderr
    assert run("up", "--model", str(tmp_path), "--decode", "0").exit_code == 2
    assert "NAME=VALUE" in run("up", "--model", str(tmp_path), "--worker-option", "x").stderr
