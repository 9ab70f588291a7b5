"""A server with OpenAI's API, asked over HTTP; any that streams will do, Headrace's or another's."""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from headrace_core.errors import (
    DeadlineError,
    HeadraceError,
    InvalidRequestError,
    OverloadedError,
    ProtocolError,
    UnavailableError,
)

from headrace_client.bench.http_connection import HttpConnection, OnBody, connect
from headrace_client.bench.target import Answered, OnTokens, Prompt

_CONNECT_TIMEOUT_S = 30.0
_DATA = b"data:"
_MOST_SAID = 300
"""Characters of what a server says of an error."""


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How to ask.

    `model` empty: the first that `/v1/models` names. `is_chat` asks for conversations, whose prompts are words instead
    of token ids, as many as tokens. `counts_always` asks for token counts in every event, so that several tokens in one
    are seen to be several; without, an event with text is a token. `wants_ids` asks for the answer's token ids, which
    Headrace and vLLM give and others leave out. `api_key` empty: none is sent.
    """

    model: str = ""
    is_chat: bool = False
    counts_always: bool = True
    wants_ids: bool = False
    api_key: str = ""
    tls_roots: str | None = None
    timeout_s: float = 600.0


class HttpTarget:
    """A `Target`. Connections are kept and used again, by one request at a time."""

    def __init__(self, base_url: str, options: HttpOptions) -> None:
        """Raises InvalidRequestError: BAD_OPTION, it is no address."""
        try:
            url = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
            port = url.port
        except ValueError as error:
            raise InvalidRequestError("BAD_OPTION", f"--base-url {base_url!r}: {error}") from None
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InvalidRequestError("BAD_OPTION", f"--base-url {base_url!r} is not http://HOST:PORT")
        self._host = url.hostname
        self._tls = ssl.create_default_context(cafile=options.tls_roots) if url.scheme == "https" else None
        self._port = port or (443 if self._tls else 80)
        self._path = url.path.rstrip("/").removesuffix("/v1")
        self._options = options
        self._model = options.model
        self._idle: list[HttpConnection] = []

    async def start(self) -> None:
        """Ask for the model's name if nobody gave it.

        Raises:
            HeadraceError: nobody answers, or not so.
        """
        if self._model:
            return
        body = bytearray()

        def on_body(_: int, data: bytes) -> None:
            body.extend(data)

        status = await self._exchange(self._head("GET", "/v1/models"), on_body)
        try:
            self._model = json.loads(body)["data"][0]["id"]
        except (ValueError, LookupError, TypeError):
            said = bytes(body[:_MOST_SAID]).decode(errors="replace")
            problem = f"the server names no model at /v1/models ({status}: {said!r}); give one with --model"
            raise ProtocolError("PROTOCOL", problem) from None

    async def ask(self, prompt: Prompt, num_output: int, on_tokens: OnTokens) -> Answered:
        """See `Target`."""
        body = json.dumps(self._fields(prompt, num_output), separators=(",", ":")).encode()
        path = "/v1/chat/completions" if self._options.is_chat else "/v1/completions"
        events = _Events(on_tokens)
        status = await self._exchange(self._head("POST", path, body), events.feed)
        if status != 200:
            raise _refusal(status, events.rest)
        if not events.is_done:
            raise ProtocolError("PROTOCOL", "the server's stream ended without [DONE]")
        return events.answered

    async def close(self) -> None:
        """See `Target`."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _fields(self, prompt: Prompt, num_output: int) -> dict[str, Any]:
        what: dict[str, Any] = {"prompt": prompt}
        if self._options.is_chat:
            words = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
            what = {"messages": [{"role": "user", "content": words}]}
        options: dict[str, Any] = {"include_usage": True}
        if self._options.counts_always:
            options["continuous_usage_stats"] = True
        if self._options.wants_ids:
            what["return_token_ids"] = True
        return {
            "model": self._model, **what, "max_tokens": num_output, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": options,
        }  # fmt: skip

    def _head(self, method: str, path: str, body: bytes = b"") -> bytes:
        host = f"[{self._host}]" if ":" in self._host else self._host
        lines = [f"{method} {self._path}{path} HTTP/1.1", f"host: {host}:{self._port}"]
        if self._options.api_key:
            lines.append(f"authorization: Bearer {self._options.api_key}")
        if body:
            lines += ["content-type: application/json", f"content-length: {len(body)}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + body

    async def _exchange(self, request: bytes, on_body: OnBody) -> int:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                break
        else:
            connection = await connect(self._host, self._port, self._tls, _CONNECT_TIMEOUT_S)
        try:
            async with asyncio.timeout(self._options.timeout_s):
                status = await connection.exchange(request, on_body)
        except TimeoutError:
            raise DeadlineError("DEADLINE_EXCEEDED", f"no answer in {self._options.timeout_s:g} s") from None
        except BaseException:
            if connection.is_open:
                connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return status


class _Events:
    """Reads one stream of server-sent events."""

    def __init__(self, on_tokens: OnTokens) -> None:
        self.answered = Answered()
        self.is_done = False
        self.rest = b""
        """What is no whole event yet, or an answer of another status."""
        self._on_tokens = on_tokens
        self._num_tokens = 0

    def feed(self, status: int, data: bytes) -> None:
        """Take more of the body.

        Raises:
            HeadraceError: the server says that something went wrong.
        """
        self.rest += data
        if status != 200:
            return
        *lines, self.rest = self.rest.split(b"\n")  # a line ends with \r\n or \n, and an event is one line of data
        for line in lines:
            if line.startswith(_DATA):
                data = line[len(_DATA) :].strip()
                try:
                    self._take(data)
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    problem = f"the server sent an event that is none of OpenAI's: {data[:80]!r}"
                    raise ProtocolError("PROTOCOL", problem) from None

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return
        event: dict[str, Any] = json.loads(data)
        if event.get("error"):
            raise _said(event["error"], 500)
        usage = event.get("usage")
        choices: list[dict[str, Any]] = event.get("choices") or []
        for choice in choices:
            self.answered.token_ids += choice.get("token_ids") or []
        num_tokens = self._num_tokens + any(map(_text_of, choices))
        if usage:
            num_output = max(self._num_tokens, usage["completion_tokens"])
            if choices:  # else it is the whole answer's, and nothing comes with it
                num_tokens = num_output
            self.answered.num_prompt, self.answered.num_output = usage["prompt_tokens"], num_output
            details = usage.get("prompt_tokens_details") or {}
            self.answered.num_cached = details.get("cached_tokens", self.answered.num_cached)
        if num_tokens > self._num_tokens:
            self._on_tokens(num_tokens - self._num_tokens)
            self._num_tokens = num_tokens


def _text_of(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or choice
    return delta.get("content") or delta.get("reasoning_content") or delta.get("text") or ""


def _refusal(status: int, body: bytes) -> HeadraceError:
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        error = {"message": body[:_MOST_SAID].decode(errors="replace")}
    return _said(error, status)


def _said(error: Any, status: int) -> HeadraceError:
    """Return the error that a server told in OpenAI's words."""
    told: dict[str, Any] = error if isinstance(error, dict) else {"message": str(error)}
    reason = str(told.get("code") or f"HTTP_{status}")
    message = f"{status}: {str(told.get('message', ''))[:_MOST_SAID]}"
    if status == 429:
        return OverloadedError(reason, message)
    if 400 <= status < 500:
        return InvalidRequestError(reason, message)
    return UnavailableError(reason, message)
