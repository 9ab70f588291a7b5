"""Answers one request for text: into the router, and its pieces to the connection.

What a step brings is written in the very call that brought it: no task is switched to for a token, and a client that
does not read has its tokens joined until it does. An answer's head is sent with its first token, so that what ends a
request before has a status.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

from headrace_core.door import Door
from headrace_core.errors import HeadraceError, OverloadedError
from headrace_core.shares import Caller

from headrace_router.face.http.connection import STALL_TIMEOUT_S
from headrace_router.face.http.errors import HttpError
from headrace_router.face.http.exchange import Exchange
from headrace_router.face.openai.about import About
from headrace_router.face.openai.call_forms import form_of
from headrace_router.face.openai.events import Events, error_event
from headrace_router.face.openai.request import Asked, Wanted
from headrace_router.face.openai.responses_events import ResponseEvents, WholeResponse
from headrace_router.face.openai.said import ForcedCalls, MakeReader, Plain, Thinking
from headrace_router.face.openai.several import Pieces, Several
from headrace_router.face.openai.whole import Whole
from headrace_router.requests.running import RunningRequest
from headrace_router.router import Router

_NO_CALLS = (
    "`tool_choice` `auto`: this model's template has no calls in a form that is known here: those of Hermes and Qwen, "
    "DeepSeek-V3 to V3.1, Kimi-K2, Mistral and GLM; `required`, or a named function, holds any model's answer to calls"
)
_TAIL_TOKENS = 16
"""Of a prompt: what the template wrote last."""


async def generate(exchange: Exchange, asked: Asked, router: Router, door: Door, caller: Caller) -> None:
    """Answer `exchange`; gives `asked.messages` up, which may be large.

    Raises:
        HeadraceError: nothing of an answer was sent.
    """
    opened: list[RunningRequest] = []
    wanted = asked.wanted
    form = form_of(router.template_knows) if wanted.call_form == "tagged" else None
    if wanted.call_form == "tagged" and form is None:
        raise HttpError(_NO_CALLS, param="tool_choice")
    marks = () if form is None else form.marks
    if _thinks(wanted, router):
        marks = (*marks, Thinking.BEGIN, Thinking.END)

    def end() -> None:
        for each in opened:
            router.close(each)

    def on_failed() -> None:
        """Let nothing go on of an answer that can't be told whole, though its client may not know yet."""
        door.forget_message(exchange)
        end()

    metadata = exchange.invocation_metadata()
    try:
        while asked.messages:
            message = asked.messages.pop(0)
            opened.append(await router.open(message, caller, None, metadata=metadata, on_failed=on_failed, shown=marks))
        about = _about(wanted, opened, router)
        pieces: Pieces = opened[0] if len(opened) == 1 else Several(opened, about.num_samples)
        is_response = wanted.prefix == "resp"
        if wanted.is_streamed:
            await _stream(exchange, pieces, ResponseEvents(about) if is_response else Events(about))
        else:
            await _collect(exchange, pieces, WholeResponse(about) if is_response else Whole(about))
        await pieces.settle()
    finally:
        end()


def make_reader_of(wanted: Wanted, router: Router, prompt: list[int]) -> MakeReader | None:
    """Return what reads an answer to a conversation; None: nothing in it is marked."""
    if wanted.call_form == "forced":
        return ForcedCalls
    form = form_of(router.template_knows) if wanted.call_form == "tagged" else None
    inner = Plain if form is None else partial(form.make, wanted.texts)
    if _thinks(wanted, router):
        tail = b"".join(map(router.token_bytes, prompt[-_TAIL_TOKENS:]))
        has_begun = tail.rstrip().endswith(Thinking.BEGIN.encode())
        return lambda: Thinking(inner(), has_begun=has_begun)
    return None if form is None else inner


def _thinks(wanted: Wanted, router: Router) -> bool:
    """Return whether what the model thinks stands apart in its answer."""
    return wanted.is_chat and wanted.is_free and router.template_knows(Thinking.END)


def _about(wanted: Wanted, opened: Sequence[RunningRequest], router: Router) -> About:
    prompts = [each.spec.prompt_ids for each in opened]
    make_reader = make_reader_of(wanted, router, prompts[0]) if wanted.is_chat else None
    return About(
        wanted,
        answer_id=f"{wanted.prefix}-{opened[0].spec.request_id}",
        created_s=int(time.time()),
        model=router.model_name,
        prompts=prompts,
        prompt_texts=[router.text_of(prompt) if wanted.echo else "" for prompt in prompts],
        num_samples=opened[0].spec.num_samples,
        token_bytes=router.token_bytes,
        hides=router.hides,
        make_reader=make_reader,
    )


async def _collect(exchange: Exchange, running: Pieces, whole: Whole | WholeResponse) -> None:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_news() -> None:
        if done.done():
            return
        try:
            for piece in running.take_all():
                whole.take(piece)
        except HeadraceError as error:
            done.set_exception(error)
            return
        if running.is_told:
            done.set_result(None)

    running.listen(on_news)
    await done
    exchange.answer(whole.body())


async def _stream(exchange: Exchange, running: Pieces, events: Events | ResponseEvents) -> None:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    wire = exchange.wire
    plain = events.plain if isinstance(events, Events) and events.is_short else None

    def on_news() -> None:
        if done.done() or exchange.is_blocked:
            return
        try:
            text = "".join([events.take(piece) for piece in running.take_all()])
        except HeadraceError as error:
            done.set_exception(error)
            return
        if text and not exchange.has_begun:
            exchange.begin_stream(text)
            text = ""
        if running.is_told:
            exchange.end_stream(text + events.last())
            done.set_result(None)
        elif text:
            exchange.send(text)

    def on_text(index: int, text: str, num_tokens: int) -> bool:
        if plain is None or wire.is_blocked or not exchange.has_begun or done.done():
            return False
        if event := plain(index, text, num_tokens):
            exchange.send(event)
        return True

    def on_stalled() -> None:
        problem = f"nothing of the stream was read for {STALL_TIMEOUT_S:g} s; read it faster"
        error = OverloadedError("SLOW_READER", problem)
        running.fail(error)
        exchange.keeps_alive = False
        if not done.done():
            done.set_exception(error)

    exchange.on_writable, exchange.on_stalled = on_news, on_stalled
    running.listen(on_news, on_text if plain is not None else None)
    try:
        await done
    except HeadraceError as error:
        if not exchange.has_begun:
            raise
        exchange.end_stream(error_event(error))
