"""The HTTP endpoints: which there are, who may call them, and how an error is told."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from headrace_core.door import Door
from headrace_core.errors import HeadraceError, UnavailableError
from headrace_core.request import check_request_id
from headrace_core.shares import Caller
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from headrace_router.callers.keys import Keys
from headrace_router.face.http.errors import HttpError, body_of, headers_of, status_of
from headrace_router.face.http.exchange import JSON, Exchange
from headrace_router.face.openai.generate import generate
from headrace_router.face.openai.names import CHAT_NAMES, COMPLETION_NAMES, RESPONSE_NAMES, Names, name_field
from headrace_router.face.openai.openapi import document
from headrace_router.face.openai.request import Asked, read_chat, read_completion, read_tokenize
from headrace_router.face.openai.responses import read_response
from headrace_router.router import Router

log = logging.getLogger(__name__)

_GENERATE = "/headrace.v1.GenerationService/Generate"
_INFO = "/headrace.v1.GenerationService/GetServerInfo"
_HEALTH = "/grpc.health.v1.Health/Check"
"""To the door the endpoints are these: who may call them, and what they may take."""

_Handler = Callable[[Exchange], Awaitable[None]]
_Read = Callable[[bytes, str], Asked]
"""From a body and the request's id."""


class OpenAiApp:
    """Answers exchanges; an `http.connection.App`. Event loop only."""

    def __init__(
        self,
        router: Router,
        door: Door,
        caller_of: Callable[[Any], Caller],
        metrics: CollectorRegistry,
        *,
        keys: Keys | None = None,
    ) -> None:
        self.is_ready = False
        self._router = router
        self._door = door
        self._caller_of = caller_of
        self._keys = keys
        self._metrics = metrics
        self._showing = asyncio.Lock()
        """Metrics are shown to one at a time: to make the page competes with the event loop."""
        self._created_s = int(time.time())
        self._routes: dict[str, tuple[str, _Handler]] = {
            "/v1/completions": ("POST", self._generating(read_completion, COMPLETION_NAMES)),
            "/v1/chat/completions": ("POST", self._generating(read_chat, CHAT_NAMES)),
            "/v1/responses": ("POST", self._generating(read_response, RESPONSE_NAMES)),
            "/v1/models": ("GET", self._models),
            "/tokenize": ("POST", self._tokenize),
            "/health": ("GET", self._health),
            "/ready": ("GET", self._ready),
            "/metrics": ("GET", self._show_metrics),
            "/openapi.json": ("GET", self._openapi),
        }

    async def __call__(self, exchange: Exchange) -> None:
        """Answer."""
        sent_id = exchange.headers.get("x-request-id", "")
        exchange.extra.append(("x-request-id", sent_id if _is_fit(sent_id) else secrets.token_hex(12)))
        try:
            if sent_id:
                check_request_id(sent_id)
            await self._handler(exchange)(exchange)
        except HeadraceError as error:
            exchange.answer(body_of(error), status=status_of(error), headers=headers_of(error))
        except Exception as error:
            log.error("unhandled error", extra={"path": exchange.path[:80]}, exc_info=error)
            bug = HeadraceError("BUG", "internal error")
            if not exchange.has_begun:
                exchange.answer(body_of(bug), status=status_of(bug), headers=headers_of(bug))

    def _handler(self, exchange: Exchange) -> _Handler:
        found = self._routes.get(exchange.path)
        if found is None and exchange.path.startswith("/v1/models/"):
            found = ("GET", self._model)
        if found is None:
            known = ", ".join(sorted(self._routes))
            raise HttpError(f"no such path; there are {known}", http_status=HTTPStatus.NOT_FOUND)
        method, handler = found
        if exchange.method != method and (exchange.method, method) != ("HEAD", "GET"):
            problem = f"{exchange.path} takes {method}"
            raise HttpError(problem, http_status=HTTPStatus.METHOD_NOT_ALLOWED, headers=[("allow", method)])
        kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != JSON:  # a page in a browser can't send this unasked
            raise HttpError(f"send content-type: {JSON}", http_status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        if exchange.headers.get("content-encoding", "identity").lower() != "identity":
            problem = "a body that is compressed is not taken; send it without content-encoding"
            raise HttpError(problem, http_status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        return handler

    def _generating(self, read: _Read, names: Names) -> _Handler:
        async def answer(exchange: Exchange) -> None:
            request_id = dict(exchange.extra)["x-request-id"]
            own: Names = {}
            try:
                asked = await self._door.receive(_GENERATE, exchange, lambda body: read(body, request_id))
                own = asked.names
                if self._keys is not None and len(asked.messages) > 1:  # one was counted before the body was read
                    self._keys.take_request(exchange, len(asked.messages) - 1)
                await generate(exchange, asked, self._router, self._door, self._caller_of(exchange))
            except HeadraceError as error:
                name_field(error, {**names, **own})
                raise

        return answer

    async def _tokenize(self, exchange: Exchange) -> None:
        message = await self._door.receive(_GENERATE, exchange, read_tokenize)
        try:
            token_ids = await self._router.tokenize(message, self._caller_of(exchange))
        except HeadraceError as error:
            name_field(error, CHAT_NAMES if message.HasField("chat") else COMPLETION_NAMES)
            raise
        max_tokens = self._router.info().max_context_tokens
        answer = {"count": len(token_ids), "max_model_len": max_tokens, "tokens": token_ids}
        exchange.answer(json.dumps(answer, separators=(",", ":")))

    async def _models(self, exchange: Exchange) -> None:
        await self._enter(_INFO, exchange)
        exchange.answer(json.dumps({"object": "list", "data": [self._describe()]}))

    async def _model(self, exchange: Exchange) -> None:
        await self._enter(_INFO, exchange)
        name = urllib.parse.unquote(exchange.path.removeprefix("/v1/models/"))
        if name != self._router.model_name:
            problem = f"model {name[:80]!r} is not served; {self._router.model_name!r} is"
            raise HttpError(problem, http_status=HTTPStatus.NOT_FOUND, param="model")
        exchange.answer(json.dumps(self._describe()))

    async def _health(self, exchange: Exchange) -> None:
        await self._enter(_HEALTH, exchange)
        exchange.answer('{"status":"ok"}')

    async def _ready(self, exchange: Exchange) -> None:
        await self._enter(_HEALTH, exchange)
        if not self.is_ready:
            raise UnavailableError("DRAINING", "the router is stopping; try another one")
        exchange.answer('{"status":"ready"}')

    async def _show_metrics(self, exchange: Exchange) -> None:
        await self._enter(_INFO, exchange)
        encode, content_type = choose_encoder(exchange.headers.get("accept", ""))
        async with self._showing:
            page = await asyncio.to_thread(encode, self._metrics)
        exchange.answer(page, content_type=content_type)

    async def _openapi(self, exchange: Exchange) -> None:
        await self._enter(_INFO, exchange)
        exchange.answer(json.dumps(document()))

    async def _enter(self, method: str, exchange: Exchange) -> None:
        await self._door.receive(method, exchange, bytes)

    def _describe(self) -> dict[str, Any]:
        return {
            "id": self._router.model_name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "headrace",
            "max_model_len": self._router.info().max_context_tokens,
        }


def _is_fit(request_id: str) -> bool:
    try:
        check_request_id(request_id)
    except HeadraceError:
        return False
    return True
