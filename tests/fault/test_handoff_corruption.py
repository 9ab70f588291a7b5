"""Bytes that are not what was sealed end in an error, never in a token."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from headrace.v1 import decode_service_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.garbler import NO_MESSAGE
from headrace_core.testing.hold_proxy import HoldProxy, changing
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running
from headrace_core.transfer.fake import POOLS, FakeFaults, pool_name
from headrace_core.transfer.frames import encode_frame
from headrace_core.transfer.memory import new_memory
from headrace_core.transfer.transports import memory_kind
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)
PROMPT = list(range(1, 23))
CHANNEL = decode_service_pb2.FAILURE_SIDE_CHANNEL


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("index", [0, 5])
@pytest.mark.parametrize("transport", ["grpc", "shm", "fake"])
@async_test
async def test_one_flipped_bit_in_any_page_is_noticed(transport: str, layer: int, index: int):
    held = loaded_fake_model(memory=new_memory(memory_kind([transport])))
    prefiller = PrefillService(PrefillSettings(model="."), loader=lambda _: held, transports=[transport])
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: loaded_fake_model(), transports=[transport])

    def flip(event):
        if event.HasField("run") and event.run.first_page <= index < event.run.first_page + len(event.run.pages):
            held.cache.page_bytes(layer, event.run.pages[index - event.run.first_page].page_id)[-1] ^= 1
        return [event]

    async with (
        running(prefiller, decoder) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        proxy.rewrite = flip
        collected = router.start("r", PROMPT, params=GREEDY)
        assert (await collected.wait_failure()).reason == "CHECKSUM"
        assert (collected.side, collected.joined, len(collected.token_ids)) == (CHANNEL, None, 1)


class BrokenHolder:
    """A TransferService that sends `frames` and then ends, well or with `code`."""

    def __init__(self, frames: list[bytes], code: grpc.StatusCode | None = None) -> None:
        self._frames = frames
        self._code = code

    async def serve(self) -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server()
        handlers: dict[str, Any] = {"Pull": grpc.unary_stream_rpc_method_handler(self._pull)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("headrace.v1.TransferService", handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, f"127.0.0.1:{port}"

    async def _pull(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for frame in self._frames:
            yield frame
        if self._code:
            await context.abort(self._code, "broken")


FULL = 6 * 2 * 4 * 16  # pages x layers x page_size x bytes of a row

BROKEN = {
    "truncated": (BrokenHolder([encode_frame([memoryview(bytes(FULL - 1))])]), "SHORT_READ"),
    "empty": (BrokenHolder([]), "SHORT_READ"),
    "too-long": (BrokenHolder([encode_frame([memoryview(bytes(FULL + 1))])]), "SHORT_READ"),
    "zeros": (BrokenHolder([encode_frame([memoryview(bytes(FULL))])]), "CHECKSUM"),
    "garbage": (BrokenHolder([b"\xff\xff"]), "SHORT_READ"),
    "no-message": (BrokenHolder([NO_MESSAGE]), "SHORT_READ"),
    "huge-length": (BrokenHolder([b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"]), "SHORT_READ"),
    "no-payload": (BrokenHolder([b""] * 1000), "SHORT_READ"),
    "invalid-without-reason": (BrokenHolder([], grpc.StatusCode.INVALID_ARGUMENT), "HOLDER_LOST"),
    "lost-without-reason": (BrokenHolder([], grpc.StatusCode.ABORTED), "HOLDER_LOST"),
    "unavailable": (BrokenHolder([], grpc.StatusCode.UNAVAILABLE), "HOLDER_LOST"),
    "unknown": (BrokenHolder([], grpc.StatusCode.UNKNOWN), "HOLDER_LOST"),
}


@pytest.mark.parametrize("kind", BROKEN)
@async_test
async def test_a_holder_that_does_not_deliver_ends_in_an_error(kind: str):
    holder, reason = BROKEN[kind]
    prefiller = PrefillService(PrefillSettings(model="."), loader=lambda _: loaded_fake_model())
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: loaded_fake_model())
    server, address = await holder.serve()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        proxy.rewrite = changing("admitted", lambda admitted: setattr(admitted.shards[0], "endpoint", address))
        collected = router.start("r", PROMPT, params=GREEDY)
        assert ((await collected.wait_failure()).reason, collected.side) == (reason, CHANNEL)
    await server.stop(None)


@pytest.mark.parametrize(
    ("faults", "reason"),
    [({"has_flipped_byte": True}, "CHECKSUM"), ({"is_truncated": True}, "SHORT_READ")],
    ids=["flipped", "truncated"],
)
@async_test
async def test_the_fake_transport_fails_closed_too(faults: dict[str, Any], reason: str):
    prefiller = PrefillService(PrefillSettings(model="."), loader=lambda _: loaded_fake_model(), transports=["fake"])
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: loaded_fake_model(), transports=["fake"])
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        POOLS[pool_name(prefiller.host.incarnation)].faults = FakeFaults(**faults)
        collected = router.start("r", PROMPT, params=GREEDY)
        assert ((await collected.wait_failure()).reason, collected.side) == (reason, CHANNEL)


@async_test
async def test_a_page_reused_while_its_bytes_were_read_is_noticed_at_the_end():
    """The fence of one-sided reads: the bytes are whole, but they are another sequence's."""
    prefiller = PrefillService(PrefillSettings(model="."), loader=lambda _: loaded_fake_model(), transports=["fake"])
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: loaded_fake_model(), transports=["fake"])
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        faults = POOLS[pool_name(prefiller.host.incarnation)].faults
        faults.gate = asyncio.Event()
        collected = router.start("r", PROMPT, params=GREEDY)
        await faults.entered.wait()
        (lease,) = prefiller.leases.leases
        # As a transport that reads memory without asking: no look before each frame, only the last one.
        prefiller.leases.held_pages = lambda *_, first_page, num_pages, **__: lease.runs[0].page_ids[first_page:][
            :num_pages
        ]
        faults.gate.set()
        run = lease.runs[0]
        object.__setattr__(run, "generations", (run.generations[0] - 1, *run.generations[1:]))
        assert (await collected.wait_failure()).reason == "STALE_PAGE"
        assert collected.side == decode_service_pb2.FAILURE_SIDE_PREFILL
        assert collected.joined is None
