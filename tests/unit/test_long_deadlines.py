"""Whatever deadline gRPC can say is a legal one, at every rpc of every process."""

import asyncio

import pytest
from headrace.v1 import decode_service_pb2, hold_service_pb2
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.request import MOST_TIMEOUT_S, SamplingParams
from headrace_core.testing.async_test import async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService
from headrace_router.testing import run_router, scripted_worker, text_request

from tests.unit.raw_http2 import answer_within

DAYS_1157, YEARS_11415, YEARS_41067, FOR_EVER = "99999999S", "99999999999S", "99999999H", "99999999999999H"
TIMEOUTS = [DAYS_1157, YEARS_11415, YEARS_41067, FOR_EVER]
INVALID_ARGUMENT = 3


def workers():
    loaded = [loaded_fake_model(num_pages=128) for _ in range(2)]
    return (
        PrefillService(PrefillSettings(model="."), loader=lambda _: loaded[0]),
        DecodeService(DecodeSettings(model="."), loader=lambda _: loaded[1]),
    )


@pytest.mark.parametrize("timeout", TIMEOUTS)
def test_a_request_may_have_all_the_time_that_there_is(tmp_path, caplog, timeout):
    fakes = [scripted_worker("prefill"), scripted_worker("decode")]
    request = text_request("a", sampling={"max_tokens": 3}).SerializeToString()

    async def test(router):
        for method, message in (("Generate", request), ("GetServerInfo", b"")):
            path = f"/headrace.v1.GenerationService/{method}"
            assert await asyncio.to_thread(answer_within, router.address, path, message, timeout) is None
        assert fakes[1].starts[0].timeout_ms <= 1000 * MOST_TIMEOUT_S

    run_router(tmp_path, fakes, test)
    assert not [record for record in caplog.records if record.exc_info]
    assert not [record for record in caplog.records if record.getMessage() == "attempt failed"]


def test_without_a_deadline_and_with_a_limit_of_for_ever_so_it_is_too(tmp_path):
    async def test(router):
        await router.generate(text_request("a", sampling={"max_tokens": 3}), timeout_s=None)

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test, request_timeout_s=float("inf"))


@pytest.mark.parametrize("timeout", TIMEOUTS)
@async_test
async def test_workers_answer_calls_of_any_deadline(caplog, timeout):
    opening = decode_service_pb2.SessionRequest(open=decode_service_pb2.OpenSession(router_id=1))
    async with running(*workers()) as addresses:
        for address in addresses:
            for path in ("WorkerService/GetInfo", "WorkerService/WatchLoad"):
                assert await asyncio.to_thread(answer_within, address, f"/headrace.v1.{path}", b"", timeout) is None
            for path in ("Check", "Watch"):
                assert (
                    await asyncio.to_thread(answer_within, address, f"/grpc.health.v1.Health/{path}", b"", timeout)
                    is None
                )
        prefill, decode = addresses
        session = "/headrace.v1.DecodeService/Session"
        assert await asyncio.to_thread(answer_within, decode, session, opening.SerializeToString(), timeout) is None
        hold, nonsense = "/headrace.v1.HoldService/Hold", hold_service_pb2.HoldRequest()
        assert (
            await asyncio.to_thread(answer_within, prefill, hold, nonsense.SerializeToString(), timeout)
            == INVALID_ARGUMENT
        )
    assert not [record for record in caplog.records if record.exc_info]


@async_test
async def test_a_sequence_may_have_all_the_time_that_its_message_can_say():
    async with running(*workers()) as (prefill, decode), MiniRouter(prefill=prefill, decode=decode) as router:
        params = SamplingParams(temperature=0.0, seed=1, max_tokens=4, ignore_eos=True)
        sequences = [
            router.start(f"r{number}", [1, 2, 3], params=params, timeout_s=timeout_s)
            for number, timeout_s in enumerate((1e8, 1e11, 1.8e16))
        ]
        for sequence in sequences:
            assert len(await sequence.tokens()) == 4
