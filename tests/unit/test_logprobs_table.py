"""Log-probabilities that the command shows: what tokens stand for beside their ids, on any terminal or none."""

import json

import pytest
from headrace.v1 import generation_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace_client.commands.app import app
from headrace_client.commands.logprobs import shown
from headrace_core.testing.fake_router import FakeRouter
from headrace_router.face.grpc import encode_piece
from headrace_router.requests.piece import Piece
from rich.cells import cell_len
from typer.testing import CliRunner

TOKENS = {5: b"Once", 6: b" upon", 7: "狐".encode()[:1], 8: "狐".encode(), 9: b"\x1b[31m\n", 10: b"x" * 90, 11: b""}


def script():
    """Each of `TOKENS` in turn, and the one after it as the likeliest."""
    ids = list(TOKENS)
    for position, token_id in enumerate(ids):
        response = pb.GenerateResponse(text="w", token_ids=[token_id], request_id="a" if position == 0 else "")
        entry = response.logprobs.add(logprob=-0.5 * (position + 1), token=TOKENS[token_id])
        likeliest = ids[(position + 1) % len(ids)]
        entry.top.add(token_id=likeliest, logprob=-0.25, token=TOKENS[likeliest])
        if token_id == ids[-1]:
            response.finish_reason = types_pb2.FINISH_REASON_LENGTH
            response.usage.num_output_tokens = len(ids)
        yield response


def run(*arguments: str, width: int, **env: str):
    with FakeRouter([*script()]) as router:
        line = [*arguments, "--top-logprobs", "1", "-s", router.address]
        return CliRunner(env={"COLUMNS": str(width), **env}).invoke(app, line, catch_exceptions=False, input="Hi\n")


@pytest.mark.parametrize("command", [["generate", "Tell"], ["chat"]])
@pytest.mark.parametrize("width", [60, 100])
def test_every_token_is_shown_with_its_text_the_first_too(command, width):
    result = run(*command, width=width, NO_COLOR="1")
    assert result.exit_code == 0, result.stderr
    assert "wwwwwww\n" in result.stdout, "standard output has the text alone"
    head, *rows = [line.rstrip() for line in result.stderr.splitlines() if line.strip()]
    assert head.split() == ["#", "token", "id", "logprob", "p"]
    assert len(rows) == 2 * len(TOKENS)
    assert rows[0].split() == ["0", "'Once'", "5", "-0.5000", "60.65%"]
    assert rows[1].split() == ["'", "upon'", "6", "-0.2500", "77.88%"]
    assert rows[2].split() == ["1", "'", "upon'", "6", "-1.0000", "36.79%"]
    assert "b'\\xe7'" in rows[4]
    assert "'狐'" in rows[6]
    assert "'\\x1b[31m\\n'" in rows[8]
    assert max(map(cell_len, rows)) <= width
    assert "\x1b" not in result.stderr


def test_json_has_the_tokens_as_text():
    (sample,) = json.loads(run("generate", "Tell", "--json", width=60).stdout)["samples"]
    assert [entry["token"] for entry in sample["logprobs"]][:4] == ["Once", " upon", "\ufffd", "狐"]
    assert [entry["top_tokens"] for entry in sample["logprobs"]][:2] == [[" upon"], ["\ufffd"]]
    assert sample["logprobs"][0]["top"] == [[6, -0.25]]


def test_a_router_that_says_no_texts_has_ids_shown():
    assert shown(b"") == "''"


def test_the_router_says_what_tokens_stand_for_and_leaves_out_what_is_too_long():
    top = [types_pb2.TopLogprob(token_id=6, logprob=-1.0)]
    entries = [types_pb2.TokenLogprobs(logprob=-0.5, top=top) for _ in range(2)]
    piece = Piece(0, "Once", [5, 10], entries, True, None)
    message = encode_piece(piece, "a", {**TOKENS, 10: b"x" * 257}.__getitem__)
    assert [(entry.token, entry.top[0].token) for entry in message.logprobs] == [(b"Once", b" upon"), (b"", b" upon")]
    assert not entries[0].token, "the piece itself is not changed"
