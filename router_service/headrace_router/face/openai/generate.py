"""Answers one request for text: through the door, into the router, and its pieces to the connection.

What a step brings is written in the very call that brought it: no task is switched to for a token, and a client that
does not read has its tokens joined until it does. An answer's head is sent with its first token, so that what ends a
request before has a status.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from headrace_core.door import Door
from headrace_core.errors import HeadraceError, OverloadedError
from headrace_core.shares import Caller

from headrace_router.face.http.connection import STALL_TIMEOUT_S
from headrace_router.face.http.exchange import Exchange
from headrace_router.face.openai.about import About
from headrace_router.face.openai.events import Events, error_event
from headrace_router.face.openai.request import Asked
from headrace_router.face.openai.responses import ResponseEvents, WholeResponse
from headrace_router.face.openai.whole import Whole
from headrace_router.requests.running import RunningRequest
from headrace_router.router import Router

GENERATE = "/headrace.v1.GenerationService/Generate"
"""To the door a request over HTTP is one over gRPC."""

Read = Callable[[bytes, str], Asked]
"""From a body and the request's id."""


async def generate(
    exchange: Exchange, read: Read, request_id: str, router: Router, door: Door, caller_of: Callable[[Any], Caller]
) -> None:
    """Answer `exchange`.

    Raises:
        HeadraceError: nothing of an answer was sent.
    """
    asked = await door.receive(GENERATE, exchange, lambda body: read(body, request_id))
    running = await router.open(
        asked.message,
        caller_of(exchange),
        None,
        metadata=exchange.invocation_metadata(),
        on_failed=lambda: door.forget_message(exchange),
    )
    spec, wanted = running.spec, asked.wanted
    about = About(
        wanted,
        answer_id=f"{wanted.prefix}-{spec.request_id}",
        created_s=int(time.time()),
        model=router.model_name,
        prompt_ids=spec.prompt_ids,
        prompt_text=router.text_of(spec.prompt_ids) if wanted.echo else "",
        token_bytes=router.token_bytes,
    )
    del asked  # it may be large, and nobody needs it any more
    try:
        is_response = wanted.prefix == "resp"
        if wanted.is_streamed:
            events = ResponseEvents(about) if is_response else Events(about, spec.num_samples)
            await _stream(exchange, running, events)
        else:
            whole = WholeResponse(about) if is_response else Whole(about, spec.num_samples)
            await _collect(exchange, running, whole)
        await running.settle()
    finally:
        router.close(running)


async def _collect(exchange: Exchange, running: RunningRequest, whole: Whole | WholeResponse) -> None:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_news() -> None:
        if done.done():
            return
        try:
            while (piece := running.take()) is not None:
                whole.take(piece)
        except HeadraceError as error:
            done.set_exception(error)
            return
        if running.is_told:
            done.set_result(None)

    running.listen(on_news)
    await done
    exchange.answer(whole.body())


async def _stream(exchange: Exchange, running: RunningRequest, events: Events | ResponseEvents) -> None:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_news() -> None:
        if done.done() or exchange.is_blocked:
            return
        try:
            text = ""
            while (piece := running.take()) is not None:
                text += events.take(piece)
        except HeadraceError as error:
            done.set_exception(error)
            return
        if text and not exchange.has_begun:
            exchange.begin_stream()
        if running.is_told:
            exchange.end_stream(text + events.last())
            done.set_result(None)
        elif text:
            exchange.send(text)

    def on_stalled() -> None:
        problem = f"nothing of the stream was read for {STALL_TIMEOUT_S:g} s; read it faster"
        error = OverloadedError("SLOW_READER", problem)
        running.fail(error)
        exchange.keeps_alive = False
        if not done.done():
            done.set_exception(error)

    exchange.on_writable, exchange.on_stalled = on_news, on_stalled
    running.listen(on_news)
    try:
        await done
    except HeadraceError as error:
        if not exchange.has_begun:
            raise
        exchange.end_stream(error_event(error))
