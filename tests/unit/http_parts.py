"""A client of HTTP that can also write nonsense, and the router with an HTTP face."""

import asyncio
import contextlib
import json
from dataclasses import dataclass

from headrace_core.testing.async_test import WAIT_S
from headrace_router.testing import byte_ids, run_router, scripted_worker, write_tokenizer

END = 999
HERMES = """{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for m in messages %}{{ m.content }}
{%- endfor %}<tool_call>{"name": .., "arguments": ..}</tool_call>"""
THINKS = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"


@dataclass
class Answer:
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]

    @property
    def events(self):
        """What each event's data says; [DONE] as it is."""
        data = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [each if each == "[DONE]" else json.loads(each) for each in data]

    @property
    def text(self):
        """Of a stream of completions or of a conversation's, the choices' texts by index."""
        texts = {}
        for event in self.events[:-1]:
            for choice in event.get("choices", ()):
                piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                texts[choice["index"]] = texts.get(choice["index"], "") + piece
        return texts


class Http:
    """One connection; `async with`."""

    def __init__(self, address, tls=None):
        self._address, self._tls = address, tls

    async def __aenter__(self):
        host, _, port = self._address.rpartition(":")
        self.reader, self.writer = await asyncio.open_connection(
            host, int(port), ssl=self._tls, server_hostname="router.headrace.internal" if self._tls else None
        )
        return self

    async def __aexit__(self, *_):
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    def send(self, data):
        self.writer.write(data)

    def ask(self, method, path, body=None, **headers):
        self.send(request(method, path, body, **headers))

    async def head(self):
        """Return the status and headers of the next answer."""
        async with asyncio.timeout(WAIT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines)

    async def chunk(self):
        """Return the next chunk of a stream; empty for its end."""
        async with asyncio.timeout(WAIT_S):
            size = int(await self.reader.readline(), 16)
            data = await self.reader.readexactly(size + 2)
        return data[:-2]

    async def answer(self, has_body=True):
        status, headers = await self.head()
        body = b""
        async with asyncio.timeout(WAIT_S):
            if not has_body:
                pass
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            elif headers.get("transfer-encoding") == "chunked":
                while chunk := await self.chunk():
                    body += chunk
            elif status != 100:
                body = await self.reader.read()
        return Answer(status, headers, body)

    async def closed(self):
        """Wait until the server ended the connection; return what came before."""
        async with asyncio.timeout(WAIT_S):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""


def request(method, path, body=None, **headers):
    """Return a request; `body` is JSON's value, or bytes."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    named = {"host": "x", "content-length": str(len(content))}
    if method == "POST":
        named["content-type"] = "application/json"
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items() if value is not None)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


async def once(address, method, path, body=None, **headers):
    """Return the answer to one request."""
    async with Http(address) as http:
        http.ask(method, path, body, **headers)
        return await http.answer(has_body=method != "HEAD")


def run_http(folder, workers, test, **settings):
    """Run `test(router, address)`, address of the HTTP face; afterwards nothing is left anywhere."""

    async def with_address(router):
        await test(router, router.service.addresses["http_address"])

    run_router(folder, workers, with_address, http_listen="127.0.0.1:0", **settings)


def run_saying(folder, text, test, template):
    """`run_http` with a model that answers `text`, whatever it is asked, and has this chat template."""
    model = write_tokenizer(folder / "tiny")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    ids = [*byte_ids(text), END]

    def next_token(tokens, num_prompt):
        return ids[len(tokens) - num_prompt]

    options = {"eos_token_ids": (END,), "next_token": next_token, "vocab_size": END + 1}
    run_http(folder, [scripted_worker("prefill", **options), scripted_worker("decode", **options)], test)
