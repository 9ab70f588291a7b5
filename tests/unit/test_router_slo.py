"""Targets for a request's speed: where they come from, what is forecast, who goes first, and who is refused early."""

import asyncio
import json
import math
from dataclasses import dataclass, field

import pytest
from headrace.v1 import generation_service_pb2
from headrace_core.config import RouterSettings
from headrace_core.errors import InvalidRequestError, OverloadedError, StartupError
from headrace_core.slo import NO_TARGETS, Targets, read_classes
from headrace_core.testing.async_test import async_test
from headrace_router.callers.keys import Keys
from headrace_router.face.openai.request import read_completion
from headrace_router.placement.capacity import Waiting, WorkerView
from headrace_router.placement.fair_queue import FairQueue, Turn
from headrace_router.placement.forecast import Forecast, num_lacking
from headrace_router.placement.line import Line
from headrace_router.placement.policy import plan
from headrace_router.requests.targets import targets_of
from headrace_router.testing import RouterUnderTest, scripted_worker, text_request
from pydantic import ValidationError

from tests.unit.router_dispatch_parts import StubSample, a_queue, failure

CLASSES = {"interactive": Targets(0.5, 0.05), "batch": Targets(60.0)}


@dataclass(eq=False)
class Item:
    client: tuple[str, ...]
    order: tuple[float, ...]
    cost: float = 1.0
    turn: Turn = field(init=False)

    def __post_init__(self):
        self.turn = Turn(self.client, self.order, self.cost)


def level(**fields):
    return generation_service_pb2.GenerateRequest(service_level=generation_service_pb2.ServiceLevel(**fields))


def test_classes_are_read_as_written():
    assert read_classes("interactive=500/50, batch=60000,any=0") == {**CLASSES, "any": NO_TARGETS}
    assert read_classes("") == {}


@pytest.mark.parametrize("text", ["a", "a=", "a=-1", "a=1.5", "a=1/2/3", "A=1", "a=1,a=2", "default=1", "a=1/x", "=1"])
def test_what_is_no_class_does_not_start(text, tmp_path):
    with pytest.raises(ValidationError):
        RouterSettings(model=tmp_path, slo_classes=text)


def test_a_request_says_more_than_its_class_and_its_class_more_than_its_key():
    assert targets_of(level(), CLASSES, "") == NO_TARGETS
    assert targets_of(level(), CLASSES, "batch") == Targets(60.0)
    assert targets_of(level(slo_class="interactive"), CLASSES, "batch") == Targets(0.5, 0.05)
    assert targets_of(level(slo_class="interactive", ttft_ms=800), CLASSES, "") == Targets(0.8, 0.05)
    assert targets_of(level(slo_class="interactive", ttft_ms=0, itl_ms=0), CLASSES, "") == NO_TARGETS
    with pytest.raises(InvalidRequestError, match="'gold'; this router has batch, interactive"):
        targets_of(level(slo_class="gold"), CLASSES, "batch")


def test_a_key_has_a_class_that_the_router_knows(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(f'[alice]\nsha256 = "{"0" * 64}"\nslo_class = "batch"\n')
    with pytest.raises(StartupError, match="slo_class 'batch' is not in --slo-classes"):
        Keys(file)
    keys = Keys(file, classes=CLASSES)
    assert keys.slo_class_of(type("C", (), {"name": "key:alice"})()) == "batch"
    assert keys.slo_class_of(type("C", (), {"name": "10.0.0.1"})()) == ""


def test_http_says_the_same():
    def message(**fields):
        return read_completion(json.dumps({"prompt": "x", **fields}).encode(), "").messages[0]

    asked = message(service_tier="interactive", slo_ttft_ms=800, priority=-3)
    assert asked.service_level == generation_service_pb2.ServiceLevel(slo_class="interactive", ttft_ms=800)
    assert asked.priority == -3
    for tier in ("auto", "default", None):
        assert not message(service_tier=tier).HasField("service_level")


def test_a_line_through_times_is_found_again():
    line = Line()
    for amount in (10, 20, 40, 30, 10):
        assert math.isnan(line.at(1)) or line.is_known
        line.observe(amount, 0.5 + 0.01 * amount)
    assert line.at(0) == pytest.approx(0.5)
    assert line.at(100) == pytest.approx(1.5)


def test_a_line_through_amounts_that_are_alike_is_their_proportion():
    line = Line()
    for _ in range(5):
        line.observe(100, 2.0)
    assert line.at(50) == pytest.approx(1.0)


def test_a_line_falls_neither_with_amounts_nor_below_zero():
    line = Line()
    for amount, time_s in ((10, 3.0), (20, 2.0), (30, 1.0), (10, 3.0)):
        line.observe(amount, time_s)
    assert line.at(1000) >= line.at(10) > 0
    steep = Line()
    for amount in (10, 20, 30, 40):
        steep.observe(amount, 0.1 * amount - 0.5)
    assert steep.at(1) >= 0


def test_a_queue_is_as_fast_as_it_was_while_somebody_waited():
    forecast = Forecast()
    forecast.on_round(0.0, 1000.0, is_waiting=False)  # nobody waited: it says nothing
    assert forecast.wait_s(0.0, 500.0, 10.0) == 0.0
    forecast.on_round(1.0, 0.0, is_waiting=True)
    for second in range(2, 12):
        forecast.on_round(float(second), 100.0, is_waiting=True)
    assert forecast.wait_s(11.0, 500.0, 1.0) == pytest.approx(5.0, rel=0.05)
    assert forecast.wait_s(11.0, 0.0, 1.0) == 0.0


def test_a_queue_that_stands_still_makes_later_ones_wait_longer():
    forecast = Forecast()
    forecast.on_round(0.0, 0.0, is_waiting=True)
    waits = [forecast.wait_s(second, 100.0, 10.0) for second in (1.0, 2.0, 4.0)]
    assert 0 < waits[0] < waits[1] < waits[2]


def test_what_is_ahead_is_of_others_no_more_than_of_oneself():
    queue = FairQueue()
    for number in range(5):
        queue.add(Item(("here", "loud"), (number,), 10.0))
    queue.add(Item(("there", "small"), (9.0,), 3.0))
    mine = Turn(("else", "me"), (20.0,), 10.0)
    assert queue.cost_ahead(mine) == 10.0 + 3.0
    for number in range(2):
        queue.add(Item(("else", "me"), (10.0 + number,), 10.0))
    assert queue.cost_ahead(mine) == 20.0 + 30.0 + 3.0
    assert queue.cost_ahead(Turn(("else", "me"), (10.5,), 10.0)) == 10.0 + 20.0 + 3.0
    assert queue.cost_ahead(Turn(("here", "other"), (30.0,), 10.0)) == 10.0 + 20.0 + 3.0, "names share their address's"


def test_a_clients_urgent_requests_go_first_and_take_nothing_from_others():
    queue = FairQueue()
    items = [
        Item(("a", "a"), (0, 60.0)), Item(("a", "a"), (0, 61.0)), Item(("b", "b"), (0, 62.0)),
        Item(("a", "a"), (0, 3.0)), Item(("a", "a"), (-1, 99.0)),
    ]  # fmt: skip
    for item in items:
        queue.add(item)
    served = []
    while len(queue):
        served.append(next(iter(queue)))
        queue.serve(served[-1])
    own = [item for item in served if item.client == ("a", "a")]
    assert own == [items[4], items[3], items[0], items[1]], "by priority, then by when they are due"
    assert served.index(items[2]) <= 1, "the other client's is one of the first two"


def view(address, *, step_s=0.0, can_prefill=False):
    return WorkerView(
        address, 16, 100, 100, 100, 512, 0, 8, can_prefill, not can_prefill, num_slots=8, step_s=step_s
    )  # fmt: skip


def test_a_decode_worker_whose_steps_are_short_enough_comes_before_one_with_more_room():
    fleet = [view("p", can_prefill=True), view("fast", step_s=0.02), view("slow", step_s=0.2)]
    fleet[1].num_free_pages = 50
    waiting = Waiting(16, 32, 1, num_most_tokens=32)
    assert [each.decode for each in plan([waiting], fleet)] == ["slow"]
    urgent = Waiting(16, 32, 1, num_most_tokens=32, most_step_s=0.05)
    assert [each.decode for each in plan([urgent], fleet)] == ["fast"]


def test_cached_tokens_take_no_time():
    class Half:
        def num_cached_tokens(self, cached, page_size):
            return 60 if cached else 0

    waiting = Waiting(100, 120, 1, prefix=Half())
    fleet = [view("p", can_prefill=True), view("q", can_prefill=True)]
    assert num_lacking(waiting, fleet) == 100
    fleet[1].cached = {1}
    assert num_lacking(waiting, fleet) == 40


@async_test
async def test_one_whose_target_is_out_of_reach_is_refused_when_it_comes():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill")
        queue.add_worker("d", "decode")
        forecast = queue.dispatcher._book.forecast
        for _ in range(4):
            forecast.on_first_token(16, 2.0)
        now_s = asyncio.get_running_loop().time()
        error = await failure(queue.place(StubSample(due_s=now_s + 1.0)))
        assert isinstance(error, OverloadedError)
        assert error.reason == "SLO_UNREACHABLE"
        assert error.retry_after_s >= 0.5
        assert (await queue.placed_now(StubSample(due_s=now_s + 5.0))).decode.address == "d"


@async_test
async def test_one_that_waited_too_long_is_refused_before_it_is_late():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill")
        queue.add_worker("d", "decode", max_step_sequences=1)
        await queue.placed_now(StubSample())
        now_s = asyncio.get_running_loop().time()
        waits, patient = queue.place(StubSample(due_s=now_s + 0.05)), queue.place(StubSample())
        error = await failure(waits)
        assert error.reason == "SLO_UNREACHABLE"
        assert not patient.done()
        assert len(queue.dispatcher._book) == 1


@async_test
async def test_one_that_wants_shorter_gaps_than_any_worker_has_is_refused():
    async with a_queue() as queue:
        queue.add_worker("p", "prefill")
        decode = queue.add_worker("d", "decode")
        decode.load.num_running, decode.session.step_s = 1, 0.08
        sample = StubSample(itl_s=0.05)
        assert (await failure(queue.place(sample))).reason == "SLO_UNREACHABLE"
        decode.load.num_running = 0  # how long its steps were says nothing of an idle worker
        assert (await queue.placed_now(sample)).decode is decode


def test_a_router_refuses_it_with_429_and_counts_it(tmp_path):
    async def main():
        workers = [scripted_worker("prefill"), scripted_worker("decode")]
        settings = {"slo_classes": "interactive=50", "http_listen": "127.0.0.1:0"}
        async with RouterUnderTest(tmp_path, workers=workers, settings=settings) as router:
            await router.wait_states(["ready"] * 2)
            request = text_request("x", service_level={"slo_class": "interactive"}, sampling={"max_tokens": 2})
            assert (await router.generate(request))[0].token_ids
            forecast = router.service._router._flow._dispatcher._book.forecast
            for _ in range(200):
                forecast.on_first_token(2, 5.0)
            error = await router.refused(request)
            assert (error.reason, error.status) == ("SLO_UNREACHABLE", "RESOURCE_EXHAUSTED")
            assert error.retry_after_s > 0
            assert router.metric("headrace_refused_requests_total", reason="SLO_UNREACHABLE") == 1
            bad = text_request("x", service_level={"slo_class": "gold"})
            assert (await router.refused(bad)).reason == "BAD_REQUEST"
            host, _, port = router.service.addresses["http_address"].rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            body = json.dumps({"prompt": "x", "service_tier": "interactive"})
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            assert answer.startswith("http/1.1 429")
            assert "headrace-reason: slo_unreachable" in answer
            assert "retry-after: " in answer
            writer.close()

    asyncio.run(main())
