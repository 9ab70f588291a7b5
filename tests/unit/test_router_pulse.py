"""A worker that says nothing gets nothing new, and is lost when a health call goes unanswered too.

A router that was held up itself blames nobody.
"""

import asyncio
import time

import grpc
import pytest
from headrace_core.errors import UnavailableError
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_worker import FakeWorker
from headrace_router.fleet import pulse
from headrace_router.fleet.pulse import ANSWER_TURNS, SUSPECT_TURNS, Pulse
from headrace_router.testing import VOCAB_SIZE, RouterUnderTest, text_request

TURN_S = 0.01


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(pulse, "TURN_S", TURN_S)


class Check:
    """A health call."""

    def __init__(self, code):
        self._code = code
        self._is_over = False
        self._on_done = []
        if code is not None:
            asyncio.get_running_loop().call_soon(self._end)

    def add_done_callback(self, on_done):
        self._on_done.append(on_done)

    async def code(self):
        return self._code

    async def details(self):
        return "Socket closed"

    def cancel(self):
        self._end()

    def _end(self):
        if not self._is_over:
            self._is_over = True
            for on_done in self._on_done:
                on_done(self)


class Health:
    """Answers health calls with `code`; with None, never."""

    def __init__(self, code=None):
        self.code = code
        self.num_asked = 0

    def Check(self, _):
        self.num_asked += 1
        return Check(self.code)


@pytest.mark.usefixtures("fast")
@async_test
async def test_a_worker_that_says_nothing_is_suspect_and_then_lost():
    suspect_s = []
    began_s = time.monotonic()
    watched = Pulse(Health(), lambda: suspect_s.append(time.monotonic() - began_s))
    with pytest.raises(UnavailableError, match="no load reports and answers no health call") as caught:
        await watched.run()
    assert caught.value.reason == "WORKER_LOST"
    assert watched.is_suspect
    assert suspect_s[0] > SUSPECT_TURNS * TURN_S
    assert time.monotonic() - began_s > (SUSPECT_TURNS + ANSWER_TURNS) * TURN_S


@pytest.mark.parametrize("code", [grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED], ids=lambda code: code.name)
@pytest.mark.usefixtures("fast")
@async_test
async def test_one_that_answers_stays_suspect_until_it_makes_a_report(code):
    health = Health(code)
    watched = Pulse(health, lambda: None)
    running = asyncio.ensure_future(watched.run())
    await eventually(lambda: health.num_asked == 3, "it is asked again and again")
    assert not running.done()
    assert watched.is_suspect
    watched.heard()
    assert not watched.is_suspect
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.usefixtures("fast")
@async_test
async def test_one_whose_reports_come_is_not_lost_by_a_health_call_that_takes_its_time():
    health = Health()
    watched = Pulse(health, lambda: None)
    running = asyncio.ensure_future(watched.run())
    await eventually(lambda: health.num_asked == 1, "it is asked")
    for _ in range(5 * ANSWER_TURNS):
        watched.heard()
        await asyncio.sleep(TURN_S / 2)
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.usefixtures("fast")
@async_test
async def test_one_whose_connection_is_gone_is_lost_at_once():
    with pytest.raises(UnavailableError, match="Socket closed"):
        await Pulse(Health(grpc.StatusCode.UNAVAILABLE), lambda: None).run()


@pytest.mark.usefixtures("fast")
@async_test
async def test_a_router_that_was_held_up_itself_blames_no_worker():
    """However often: what was said meanwhile waits to be read."""
    health = Health()
    watched = Pulse(health, lambda: None)
    running = asyncio.ensure_future(watched.run())
    for _ in range(4):
        await asyncio.sleep(0)
        time.sleep(2 * (SUSPECT_TURNS + ANSWER_TURNS) * TURN_S)  # noqa: ASYNC251 - the loop is to be held up
        await asyncio.sleep(TURN_S / 4)  # and then reads
        watched.heard()
    assert health.num_asked == 0
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])


def test_nothing_new_goes_to_a_suspect_worker_and_it_is_part_of_the_fleet(tmp_path):
    async def main():
        workers = [FakeWorker("both", vocab_size=VOCAB_SIZE, num_pages=pages) for pages in (512, 256)]
        silent, other = workers
        async with RouterUnderTest(tmp_path, workers=workers) as router:
            await router.wait_states(["ready", "ready"])
            silent.faults.load_gate.clear()
            await router.wait_states(["ready", "suspect"])
            for _ in range(4):
                await router.generate(text_request("a", sampling={"max_tokens": 2}))
            assert (len(silent.starts), len(other.starts)) == (0, 4)
            await other.set_ready(False)
            await router.wait_states(["draining", "suspect"])
            asking = asyncio.ensure_future(router.generate(text_request("a", sampling={"max_tokens": 2})))
            await eventually(lambda: router.service._router.num_queued == 1, "it waits, and is not refused")
            silent.faults.load_gate.set()
            await asking
            assert len(silent.starts) == 1

    asyncio.run(main())
