"""What each event does, by name, to a request that stands in its phase."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from headrace_core.errors import HeadraceError
from headrace_core.request import hash_tokens

from tests.matrix.process import ChildProcess, Gone
from tests.matrix.scene import FOREIGN

if TYPE_CHECKING:
    from tests.matrix.cell import Play

Strike = Callable[["Play"], Awaitable[None]]
STRIKES: dict[str, Strike] = {}


def _strike(function: Strike) -> Strike:
    STRIKES[function.__name__] = function
    return function


@_strike
async def client_abort(play: Play) -> None:
    play.asking.leave()
    await play.asking.outcome


@_strike
async def deadline(play: Play) -> None:
    await play.asking.outcome  # the gate is shut until then


@_strike
async def slow_reader(play: Play) -> None:
    play.asking.read_no_more()


def _signals(name: str, number: signal.Signals) -> None:
    for role in ("prefill", "decode", "router"):

        async def strike(play: Play, role: str = role) -> None:
            victim: ChildProcess = getattr(play.scene, role)
            victim.signal(number)
            if number is signal.SIGKILL:
                await victim.ended()
            elif number is signal.SIGTERM:
                with contextlib.suppress(Gone):  # with nothing under way it is gone already
                    await victim.ask("draining")

        STRIKES[f"{name}_{role}"] = strike


_signals("kill", signal.SIGKILL)
_signals("stop", signal.SIGSTOP)
_signals("term", signal.SIGTERM)


@_strike
async def hang_prefill(play: Play) -> None:
    play.scene.prefill.hang()


@_strike
async def hang_decode(play: Play) -> None:
    play.scene.decode.hang()


@_strike
async def partition_prefill(play: Play) -> None:
    play.scene.proxies[play.scene.prefill.name].freeze()


@_strike
async def partition_decode(play: Play) -> None:
    play.scene.proxies[play.scene.decode.name].freeze()


@_strike
async def partition_client(play: Play) -> None:
    play.scene.proxies[play.scene.router.name].freeze()


def _bytes(fault: str) -> None:
    async def strike(play: Play) -> None:
        if play.phase != "transferring":
            await play.scene.decode.ask("spoil_entries", fault)
        elif play.scene.transport == "grpc":
            await play.scene.prefill.ask("spoil_frames", fault)
        else:
            await play.scene.decode.ask("spoil_bytes", fault)

    STRIKES[fault] = strike


for _fault in ("corrupted", "truncated", "duplicated", "reordered"):
    _bytes(_fault)


@_strike
async def reused_page(play: Play) -> None:
    await play.scene.prefill.ask("reuse_pages")


@_strike
async def restarted_holder(play: Play) -> None:
    await play.scene.prefill.kill()
    await play.scene.restart(play.scene.prefill)


@_strike
async def foreign_model(play: Play) -> None:
    await play.scene.prefill.kill()
    await play.scene.restart(play.scene.prefill, **FOREIGN)


@_strike
async def older_attempt(play: Play) -> None:
    from headrace.v1 import decode_service_pb2 as pb
    from headrace_core.testing.mini_taker import MiniTaker

    router_id, attempt, content = await play.scene.decode.ask("start_again")
    assert attempt == 1, "the first attempt's start is heard again"
    if play.phase in ("decoding", "finishing"):
        return  # the prefill worker knows nothing of it any more
    start = pb.StartSequence.FromString(content)

    def as_then(message: object) -> None:
        message.sequence_number = start.sequence_number  # type: ignore[attr-defined]
        message.sampling.CopyFrom(start.sampling)  # type: ignore[attr-defined]

    token_ids = list(start.token_ids)
    assert hash_tokens(token_ids), "it names its tokens"
    async with MiniTaker(play.scene.prefill.address, router_id=router_id) as taker:
        error: HeadraceError = await taker.order("late", token_ids, params=play.params, change=as_then).refused()
        assert error.reason == "STALE_ATTEMPT", f"an older Open ended with {error.reason}"


@_strike
async def prefill_out_of_pages(play: Play) -> None:
    await play.scene.prefill.ask("take_pages")
    if play.phase == "queued":  # else its place is given away before the router hears that there are no pages
        await play.scene.router.ask("starved")


@_strike
async def decode_out_of_pages(play: Play) -> None:
    await play.scene.decode.ask("take_pages")
