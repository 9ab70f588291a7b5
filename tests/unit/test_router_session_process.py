"""A session comes on a connection of its own: it is opened with the process that said who it is, or not at all."""

import asyncio
import contextlib
from collections import deque

import pytest
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import HandoffLostError
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.fake_worker import FakeWorker
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.tcp_proxy import TcpProxy
from headrace_core.testing.worker_pair import running
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService
from headrace_router.testing import VOCAB_SIZE, RouterUnderTest, tokens_request

from tests.unit.test_router_samples import At


class SeveralBehindOne(TcpProxy):
    """Each connection reaches the next of its targets; the last one stays."""

    def __init__(self, *targets):
        super().__init__()
        self.targets = deque(targets)

    async def _pass_on(self, reader, writer):
        self.target = self.targets.popleft() if len(self.targets) > 1 else self.targets[0]
        await super()._pass_on(reader, writer)


def loaded():
    return loaded_fake_model(num_pages=64, model=FakeModel(vocab_size=VOCAB_SIZE), fingerprint="fa4e" * 16)


def real(role):
    if role == "prefill":
        return PrefillService(PrefillSettings(model="."), loader=lambda _: loaded())
    return DecodeService(DecodeSettings(model="."), loader=lambda _: loaded())


def fake(role):
    return FakeWorker(role, vocab_size=VOCAB_SIZE)


def num_sessions(worker):
    return len(worker._sessions)


@pytest.mark.parametrize("make", [real, fake])
@async_test
async def test_a_session_that_reaches_another_process_than_the_one_asked_is_not_opened(tmp_path, make):
    """As when a worker starts again between the two, or a load balancer chooses anew for each connection."""
    first, second = make("decode"), make("decode")
    async with contextlib.AsyncExitStack() as stack:
        if make is real:
            prefill, *decodes = await stack.enter_async_context(running(make("prefill"), first, second))
        else:
            workers = [make("prefill"), first, second]
            prefill, *decodes = [await worker.start() for worker in workers]
            for worker in workers:
                stack.push_async_callback(worker.stop)
        between = SeveralBehindOne(*decodes)
        await between.start()
        stack.push_async_callback(between.close)
        router = await stack.enter_async_context(RouterUnderTest(tmp_path))
        router.workers = [At(prefill), At(between.address)]
        router.write_workers()
        detail = ""
        async with asyncio.timeout(WAIT_S):
            while "another process" not in detail:
                (detail,) = [each.detail for each in (await router.info()).workers if each.address == between.address]
        assert (num_sessions(first), num_sessions(second)) == (0, 0)
        between.targets = deque(decodes[:1])
        await router.wait_states(["ready", "ready"])
        assert (num_sessions(first), num_sessions(second)) == (1, 0)
        (sample,) = await router.generate(tokens_request(1, 2, 3, sampling={"max_tokens": 4, "ignore_eos": True}))
        assert len(sample.token_ids) == 4


@async_test
async def test_a_router_that_names_no_process_is_served_by_whoever_answers():
    worker = real("decode")
    async with running(worker) as (address,):
        async with MiniRouter(decode=address):
            pass
        async with MiniRouter(decode=address, worker_incarnation=worker.host.incarnation):
            pass
        with pytest.raises(HandoffLostError, match="another process") as raised:
            async with MiniRouter(decode=address, worker_incarnation=worker.host.incarnation ^ 1):
                pass
    assert raised.value.reason == "WORKER_RESTARTED"
