"""How `headrace bench` asks a server with OpenAI's API, and reads what it streams."""

import asyncio
import json

import pytest
from headrace_client.bench.http_target import HttpOptions, HttpTarget
from headrace_core.errors import HeadraceError, InvalidRequestError, OverloadedError, ProtocolError, UnavailableError


def event(choices=(), usage=None):
    return b"data: " + json.dumps({"choices": list(choices), "usage": usage}).encode() + b"\n\n"


def chunked(*parts):
    return b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts) + b"0\r\n\r\n"


DONE = b"data: [DONE]\n\n"
STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


async def ask(answer, options=None, *, times=1):
    """Return what was asked, tokens as they came, and what is told of the last answer."""
    asked, connections, tokens = [], [], []

    async def serve(reader, writer):
        connections.append(writer)
        while not reader.at_eof():
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            if head.startswith(b"GET"):
                body = b'{"data": [{"id": "served"}]}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                continue
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            asked.append((head.split(b" ")[1].decode(), json.loads(await reader.readexactly(length)), head))
            writer.write(answer)
            if not answer.endswith(b"0\r\n\r\n") and b"content-length" not in answer:
                break
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        target = HttpTarget(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", options or HttpOptions())
        try:
            await target.start()
            for _ in range(times):
                told = await target.ask([5, 6], 3, tokens.append)
        finally:
            await target.close()
            for writer in connections:
                writer.close()
                await writer.wait_closed()
    return asked, tokens, told, len(connections)


def usage(count, cached=None):
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": 2, "completion_tokens": count, **details}


def test_counts_in_events_say_how_many_tokens_came_together():
    events = [event([{"text": "a"}], usage(1)), event([{"text": "bc"}], usage(3)), event([], usage(3, cached=1)), DONE]
    asked, tokens, told, _ = asyncio.run(ask(STREAM + chunked(*events)))
    path, fields, _ = asked[0]
    assert path == "/v1/completions"
    assert (fields["model"], fields["prompt"], fields["max_tokens"], fields["ignore_eos"]) == (
        "served",
        [5, 6],
        3,
        True,
    )
    assert fields["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert tokens == [1, 2]
    assert (told.num_prompt, told.num_output, told.num_cached) == (2, 3, 1)


def test_without_counts_an_event_with_text_is_a_token():
    events = [event([{"text": "a"}]), event([{"text": ""}]), event([{"text": "b"}]), DONE]
    asked, tokens, told, _ = asyncio.run(ask(STREAM + chunked(*events), HttpOptions(counts_always=False)))
    assert "continuous_usage_stats" not in asked[0][1]["stream_options"]
    assert tokens == [1, 1]
    assert told.num_output is None


def test_events_are_read_however_they_are_cut():
    whole = b"".join([event([{"text": "a"}], usage(1)), event([{"text": "b"}], usage(2)), DONE])
    pieces = [whole[at : at + 7] for at in range(0, len(whole), 7)]
    _, tokens, told, _ = asyncio.run(ask(STREAM + chunked(*pieces)))
    assert tokens == [1, 1]
    assert told.num_output == 2


def test_conversations_are_asked_in_words_and_their_reasoning_is_text():
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}]
    events = [*(event([{"delta": delta}]) for delta in deltas), DONE]
    options = HttpOptions(model="m", is_chat=True, counts_always=False, wants_ids=True)
    asked, tokens, _, _ = asyncio.run(ask(STREAM + chunked(*events), options))
    path, fields, _ = asked[0]
    assert (path, fields["messages"]) == ("/v1/chat/completions", [{"role": "user", "content": "5 6"}])
    assert fields["return_token_ids"] is True
    assert tokens == [1]


def test_token_ids_are_kept_for_the_next_turn():
    events = [event([{"text": "a", "token_ids": [9]}]), event([{"text": "b", "token_ids": [8, 7]}]), DONE]
    _, _, told, _ = asyncio.run(ask(STREAM + chunked(*events), HttpOptions(wants_ids=True)))
    assert told.token_ids == [9, 8, 7]


def test_a_connection_is_used_again():
    answer = STREAM + chunked(event([{"text": "a"}], usage(1)), DONE)
    *_, num_connections = asyncio.run(ask(answer, HttpOptions(api_key="secret"), times=3))
    assert num_connections == 1


def test_a_key_is_sent():
    asked, *_ = asyncio.run(ask(STREAM + chunked(DONE), HttpOptions(model="m", api_key="secret")))
    assert b"authorization: Bearer secret\r\n" in asked[0][2]


ERROR = b'event: error\ndata: {"error": {"message": "m", "code": "WORKER_LOST"}}\n\n'
BODY = b'{"error": {"message": "no room", "code": "rate_limit_exceeded"}}'


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        (b"HTTP/1.1 429 x\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY, OverloadedError, "rate_limit_exceeded"),
        (b"HTTP/1.1 500 x\r\ncontent-length: 4\r\n\r\nwhat", UnavailableError, "HTTP_500"),
        (b"HTTP/1.1 404 x\r\ncontent-length: 4\r\n\r\nwhat", InvalidRequestError, "HTTP_404"),
        (STREAM + chunked(ERROR), UnavailableError, "WORKER_LOST"),
        (STREAM + chunked(event([{"text": "a"}])), ProtocolError, "PROTOCOL"),
        (STREAM + chunked(b"data: {]\n\n"), ProtocolError, "PROTOCOL"),
        (STREAM + chunked(b"data: [1]\n\n"), ProtocolError, "PROTOCOL"),
        (STREAM + chunked(b'data: {"choices": [null]}\n\n'), ProtocolError, "PROTOCOL"),
        (STREAM + chunked(b'data: {"choices": [], "usage": {}}\n\n'), ProtocolError, "PROTOCOL"),
        (STREAM + b"5\r\nabc", UnavailableError, "CONNECTION_LOST"),
        (b"SSH-2.0\r\n\r\n0\r\n\r\n", ProtocolError, "PROTOCOL"),
    ],
)
def test_what_a_server_refuses_or_cuts_short_is_an_error_with_its_reason(answer, kind, reason):
    with pytest.raises(HeadraceError) as raised:
        asyncio.run(ask(answer, HttpOptions(model="m")))
    assert (type(raised.value), raised.value.reason) == (kind, reason)


def test_a_server_that_names_no_model_needs_one_named():
    async def unnamed():
        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 404 x\r\ncontent-length: 2\r\n\r\nno")
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            target = HttpTarget(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", HttpOptions())
            try:
                await target.start()
            finally:
                await target.close()

    with pytest.raises(ProtocolError, match="--model"):
        asyncio.run(unnamed())


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(InvalidRequestError, match="base-url"):
        HttpTarget(url, HttpOptions())


def test_lines_may_end_as_windows_ends_them():
    whole = b"".join([event([{"text": "a"}], usage(1)), event([{"text": "b"}], usage(2)), DONE])
    _, tokens, told, _ = asyncio.run(ask(STREAM + chunked(whole.replace(b"\n", b"\r\n"))))
    assert (tokens, told.num_output) == ([1, 1], 2)


def test_a_count_that_comes_at_the_end_is_no_token_that_came_then():
    events = [event([{"text": "ab"}]), event([{"text": "cd"}]), event([], usage(4)), DONE]
    _, tokens, told, _ = asyncio.run(ask(STREAM + chunked(*events), HttpOptions(counts_always=False)))
    assert tokens == [1, 1]
    assert told.num_output == 4


def test_an_ipv6_address_is_named_in_brackets():
    target = HttpTarget("http://[::1]:8000", HttpOptions(model="m"))
    assert b"\r\nhost: [::1]:8000\r\n" in target._head("GET", "/v1/models")


def test_an_event_that_is_none_of_openai_s_is_quoted():
    with pytest.raises(ProtocolError, match=r"none of OpenAI's.*completion"):
        asyncio.run(ask(STREAM + chunked(b'data: {"choices": [], "usage": {"completion": 1}}\n\n')))
