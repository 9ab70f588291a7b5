"""Bytes that are not what the ticket promised end in an error, never in a token."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from headrace.v1 import transfer_service_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import HandoffLostError, TransferCorruptError
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.garbler import NO_MESSAGE
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running
from headrace_core.transfer.fake import POOLS, FakeFaults, FakePool, fake_offer
from headrace_core.transfer.frames import encode_frame
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True)
PROMPT = list(range(1, 23))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("index", [0, 5])
@async_test
async def test_one_flipped_bit_in_any_page_is_noticed(layer: int, index: int):
    held = loaded_fake_model()
    prefiller = PrefillService(PrefillSettings(model="."), loader=lambda _: held)
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: loaded_fake_model())
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        held.cache.page_bytes(layer, handoff.pages[index].page_id)[-1] ^= 1
        with pytest.raises(TransferCorruptError) as raised:
            await router.start("r", PROMPT, params=GREEDY, handoff=handoff)
        assert raised.value.reason == "CHECKSUM"


class BrokenHolder:
    """A TransferService that sends `frames` and then ends, well or with `code`; with `renewal`, it hangs instead."""

    def __init__(self, frames: list[bytes], code: grpc.StatusCode | None = None, renewal: bytes | None = None) -> None:
        self._frames = frames
        self._code = code
        self._renewal = renewal

    async def serve(self) -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server()
        handlers: dict[str, Any] = {
            "Pull": grpc.unary_stream_rpc_method_handler(self._pull),
            "RenewLease": grpc.unary_unary_rpc_method_handler(self._renew),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("headrace.v1.TransferService", handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, f"127.0.0.1:{port}"

    async def _pull(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for frame in self._frames:
            yield frame
        if self._renewal is not None:
            await asyncio.Event().wait()
        if self._code:
            await context.abort(self._code, "broken")

    async def _renew(self, request: bytes, context: Any) -> bytes:
        if self._renewal is not None:
            return self._renewal
        return transfer_service_pb2.RenewLeaseResponse(duration_ms=60_000).SerializeToString()


FULL = 6 * 2 * 4 * 16  # pages x layers x page_size x bytes of a row

BROKEN = {
    "truncated": (BrokenHolder([encode_frame([memoryview(bytes(FULL - 1))])]), TransferCorruptError, "SHORT_READ"),
    "empty": (BrokenHolder([]), TransferCorruptError, "SHORT_READ"),
    "too-long": (BrokenHolder([encode_frame([memoryview(bytes(FULL + 1))])]), TransferCorruptError, "SHORT_READ"),
    "zeros": (BrokenHolder([encode_frame([memoryview(bytes(FULL))])]), TransferCorruptError, "CHECKSUM"),
    "garbage": (BrokenHolder([b"\xff\xff"]), TransferCorruptError, "SHORT_READ"),
    "no-message": (BrokenHolder([NO_MESSAGE]), TransferCorruptError, "SHORT_READ"),
    "huge-length": (BrokenHolder([b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"]), TransferCorruptError, "SHORT_READ"),
    "no-payload": (BrokenHolder([b""] * 1000), TransferCorruptError, "SHORT_READ"),
    "renewal-no-message": (BrokenHolder([], renewal=NO_MESSAGE), HandoffLostError, "HOLDER_LOST"),
    "renewal-of-no-time": (BrokenHolder([], renewal=b""), HandoffLostError, "HOLDER_LOST"),
    "invalid-without-reason": (BrokenHolder([], grpc.StatusCode.INVALID_ARGUMENT), HandoffLostError, "HOLDER_LOST"),
    "lost-without-reason": (BrokenHolder([], grpc.StatusCode.ABORTED), HandoffLostError, "HOLDER_LOST"),
    "unavailable": (BrokenHolder([], grpc.StatusCode.UNAVAILABLE), HandoffLostError, "HOLDER_LOST"),
    "unknown": (BrokenHolder([], grpc.StatusCode.UNKNOWN), HandoffLostError, "HOLDER_LOST"),
}


@pytest.mark.parametrize("kind", BROKEN)
@async_test
async def test_a_holder_that_does_not_deliver_ends_in_an_error(kind: str):
    holder, error, reason = BROKEN[kind]
    prefiller = PrefillService(PrefillSettings(model="."), loader=lambda _: loaded_fake_model())
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: loaded_fake_model())
    server, address = await holder.serve()
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        handoff.holder_endpoint = address
        with pytest.raises(error) as raised:
            await router.start("r", PROMPT, params=GREEDY, handoff=handoff)
        assert raised.value.reason == reason
    await server.stop(None)


@pytest.mark.parametrize(
    ("faults", "reason"),
    [(FakeFaults(has_flipped_byte=True), "CHECKSUM"), (FakeFaults(is_truncated=True), "SHORT_READ")],
    ids=["flipped", "truncated"],
)
@async_test
async def test_the_fake_transport_fails_closed_too(faults: FakeFaults, reason: str):
    held = loaded_fake_model()
    prefiller = PrefillService(PrefillSettings(model="."), loader=lambda _: held, offers=[fake_offer("corruption")])
    decoder = DecodeService(DecodeSettings(model="."), loader=lambda _: loaded_fake_model(), transports=["fake"])
    async with (
        running(prefiller, decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        POOLS["corruption"] = FakePool(prefiller.leases, held.cache, faults)
        handoff = (await router.prefill("r", PROMPT, params=GREEDY)).handoff
        with pytest.raises(TransferCorruptError) as raised:
            await router.start("r", PROMPT, params=GREEDY, handoff=handoff)
        assert raised.value.reason == reason
