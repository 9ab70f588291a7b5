"""An inference server that computes nothing, over HTTP: what routers of other projects are put before.

    python -m tests.perf.router.http_stub --role decode --step-ms 20

It answers completions, and what routers ask of a server of vLLM's or SGLang's kind before they send it work: as a
prefill worker at once, with one token and with where its cache can be fetched; as a decode worker with a token each
step, all streams in one call of a timer, as the fake worker of our own protocol does. Prints its address.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
from typing import Any

import httptools
import uvloop

_MODEL = "stub"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_BEGIN = f'data: {{"id":"cmpl-0","object":"text_completion","created":1,"model":"{_MODEL}","choices":['
_TOKEN = (_BEGIN + '{"index":0,"text":" fox","logprobs":null,"finish_reason":null}]}\n\n').encode()
_LAST = (_BEGIN + '{"index":0,"text":" fox","logprobs":null,"finish_reason":"length"}]}\n\n').encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_TOKEN_CHUNK = _chunk(_TOKEN)


class Steps:
    """Calls every stream each step."""

    def __init__(self, step_s: float) -> None:
        self.streams: set[Connection] = set()
        self._step_s = step_s
        self._more = asyncio.Event()

    def add(self, stream: Connection) -> None:
        """Let a stream have a token from the next step on."""
        self.streams.add(stream)
        self._more.set()

    async def run(self) -> None:
        """Step for ever."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            due_s = max(due_s + self._step_s, loop.time())
            await asyncio.sleep(due_s - loop.time())
            for stream in list(self.streams):
                if not stream.on_step():
                    self.streams.discard(stream)
            if not self.streams:
                self._more.clear()
                await self._more.wait()


class Connection(asyncio.Protocol):
    """One client's."""

    def __init__(self, role: str, steps: Steps) -> None:
        self._role, self._steps = role, steps
        self._transport: Any = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._url, self._body = b"", b""
        self._left = 0
        self._usage = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._left = 0
        self._steps.streams.discard(self)

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path = self._url.partition(b"?")[0].decode()
        if path in ("/v1/completions", "/v1/chat/completions"):
            self._generate(json.loads(self._body))
        elif path in _ABOUT:
            self._answer(_ABOUT[path])
        else:
            self._answer(b"{}")  # health, a flushed cache, and whatever else a router likes to know

    def on_step(self) -> bool:
        """Send a token; return whether there are more."""
        if not self._left:
            return False
        self._left -= 1
        if self._left:
            self._transport.write(_TOKEN_CHUNK)
            return True
        self._transport.write(b"".join((_chunk(_LAST + self._usage + b"data: [DONE]\n\n"), b"0\r\n\r\n")))
        return False

    def _generate(self, fields: dict[str, Any]) -> None:
        num_tokens = 1 if self._role == "prefill" else int(fields.get("max_tokens", 16))
        usage = {"prompt_tokens": 50, "completion_tokens": num_tokens, "total_tokens": 50 + num_tokens}
        if not fields.get("stream"):
            choice = {"index": 0, "text": " fox" * num_tokens, "finish_reason": "length"}
            answer: dict[str, Any] = {"id": "cmpl-0", "object": "text_completion", "created": 1, "model": _MODEL}
            answer |= {"choices": [choice], "usage": usage}
            if "kv_transfer_params" in fields:  # where vLLM's decode worker is to fetch the cache
                answer["kv_transfer_params"] = {
                    "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "stub",
                    "remote_block_ids": [1, 2, 3, 4], "remote_host": "127.0.0.1", "remote_port": 1,
                }  # fmt: skip
            self._answer(json.dumps(answer).encode())
            return
        has_usage = (fields.get("stream_options") or {}).get("include_usage")
        self._usage = f'{_BEGIN}],"usage":{json.dumps(usage)}}}\n\n'.encode() if has_usage else b""
        self._left = num_tokens
        self._transport.write(_HEAD)
        if self.on_step():  # the first token is the prefill's and comes at once
            self._steps.add(self)

    def _answer(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)


def _about() -> dict[str, bytes]:
    server = {
        "model_path": _MODEL, "served_model_name": _MODEL, "tokenizer_path": _MODEL, "model_id": _MODEL,
        "is_generation": True, "version": "0", "tp_size": 1, "dp_size": 1, "max_running_requests": 4096,
        "max_total_num_tokens": 1 << 20, "internal_states": [{}],
    }  # fmt: skip
    model = {"id": _MODEL, "object": "model", "created": 1, "owned_by": "stub", "max_model_len": 1 << 17}
    info = json.dumps(server).encode()
    paths = ("/get_server_info", "/server_info", "/get_model_info", "/model_info")
    return dict.fromkeys(paths, info) | {"/v1/models": json.dumps({"object": "list", "data": [model]}).encode()}


_ABOUT = _about()


async def _serve(role: str, step_s: float) -> None:
    steps = Steps(step_s)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(role, steps), "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await steps.run()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="A server with OpenAI's completions that computes nothing.")
    parser.add_argument("--role", choices=["prefill", "decode"], required=True)
    parser.add_argument("--step-ms", type=float, default=20.0)
    options = parser.parse_args()
    uvloop.run(_serve(options.role, options.step_ms / 1000))


if __name__ == "__main__":
    main()
