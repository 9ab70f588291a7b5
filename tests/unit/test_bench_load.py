"""How `headrace bench` asks, and from when latencies count."""

import asyncio
from itertools import pairwise

import pytest
from headrace_client.bench.load import Arrivals, Load
from headrace_client.bench.prompts import Part, Session, Turn
from headrace_client.bench.target import Answered
from headrace_core.errors import InvalidRequestError, OverloadedError
from headrace_core.testing.async_test import WAIT_S


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class Server:
    """Takes `first_s` to each first token and as long to the second; moves the clock instead of waiting."""

    def __init__(self, clock, first_s=(1.0,), fails=()):
        self.clock, self.first_s, self.fails = clock, first_s, fails
        self.asked = []
        self.most_at_once = self.num_now = 0

    async def ask(self, prompt, num_output, on_tokens):
        number = len(self.asked)
        self.asked.append(prompt)
        self.num_now += 1
        self.most_at_once = max(self.most_at_once, self.num_now)
        await asyncio.sleep(0)
        if number in self.fails:
            self.num_now -= 1
            raise OverloadedError("QUEUE_FULL", "full")
        for _ in range(2):
            self.clock.now_s += self.first_s[number % len(self.first_s)]
            on_tokens(1)
        self.num_now -= 1
        return Answered(len(prompt), [7, 8], num_output=2, num_cached=1)

    async def close(self):
        pass


def sessions(count, turns=1):
    return [Session([Turn([Part((0, i, turn), 4)], 2) for turn in range(turns)]) for i in range(count)]


def run(server, asked, arrivals):
    load = Load(server, asked, arrivals, vocab_size=100, clock=server.clock)
    return asyncio.run(load.run())


def test_in_an_open_loop_waiting_for_a_server_that_stalls_counts():
    server = Server(Clock(), first_s=(10.0, 1.0, 1.0))
    records = run(server, sessions(3), Arrivals(rate=float("inf"), concurrency=1))
    # The second and third were due at 0, when the first had everything: from their sending on they took 1 s each.
    assert [record.ttft_s for record in records] == [10.0, 21.0, 23.0]
    assert [record.deltas[0][0] - record.sent_s for record in records] == [10.0, 1.0, 1.0]


def test_in_a_closed_loop_a_client_asks_when_it_has_its_answer():
    server = Server(Clock())
    records = run(server, sessions(6), Arrivals(concurrency=2))
    assert len(records) == 6
    assert server.most_at_once == 2
    assert all(record.intended_s == record.sent_s for record in records)


def test_without_a_rate_or_clients_everything_comes_at_once():
    server = Server(Clock())
    answer = server.ask

    async def ask(prompt, num_output, on_tokens):
        async with asyncio.timeout(WAIT_S):
            await everybody.wait()
        return await answer(prompt, num_output, on_tokens)

    everybody, server.ask = asyncio.Barrier(5), ask
    records = run(server, sessions(5), Arrivals())
    assert [record.intended_s for record in records] == [0.0] * 5


def test_a_turn_goes_on_from_the_answer_to_the_turn_before():
    server = Server(Clock())
    asked = sessions(1, turns=3)
    records = run(server, asked, Arrivals(concurrency=1))
    new = [turn.tokens(100) for turn in asked[0].turns]
    assert server.asked[2] == [*new[0], 7, 8, *new[1], 7, 8, *new[2]]
    assert [record.num_prompt for record in records] == [4, 10, 16]
    assert records[1].intended_s == records[0].end_s


def test_a_request_that_fails_says_why_and_ends_its_session():
    server = Server(Clock(), fails=(1,))
    load = Load(server, sessions(2, turns=3), Arrivals(concurrency=1), vocab_size=100, clock=server.clock)
    records = asyncio.run(load.run())
    assert [record.error for record in records] == ["", "QUEUE_FULL", "", "", ""]
    assert not records[1].is_ok
    assert load.tally.num_requests == len(load.tally.records) == 5


def test_tokens_without_text_count_with_the_last_that_came():
    server = Server(Clock())

    async def ask(prompt, num_output, on_tokens):
        on_tokens(1)
        return Answered(len(prompt), num_output=3)

    server.ask = ask
    (record,) = run(server, sessions(1), Arrivals())
    assert record.num_output == 3


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, (0.8, 1.2)), (0.25, (1.6, 2.4)), (float("inf"), (0.0, 0.0))])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness, spread):
    times = Arrivals(rate=5.0, burstiness=burstiness).times_s(sessions(2000))
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean
    assert times[0] == 0.0
    assert 0.17 < mean < 0.23
    assert spread[0] - 1e-6 <= variation <= spread[1] + 1e-6


def test_tokens_that_no_event_told_of_are_spread_over_those_that_came():
    server = Server(Clock())

    async def ask(prompt, num_output, on_tokens):
        for _ in range(4):
            server.clock.now_s += 1.0
            on_tokens(1)
        return Answered(len(prompt), num_output=9)

    server.ask = ask
    (record,) = run(server, sessions(1), Arrivals())
    assert [count for _, count in record.deltas] == [2, 2, 2, 3]
    assert record.itls_s() == [0.5] * 4 + [pytest.approx(1 / 3)] * 3


def test_a_run_that_is_stopped_keeps_what_was_answered_and_counts_nothing_else():
    server = Server(Clock())
    load = Load(server, sessions(12), Arrivals(concurrency=2), vocab_size=100, clock=server.clock)
    answer = server.ask

    async def ask(prompt, num_output, on_tokens):
        if len(load.tally.records) == 3:
            load.stop()
            await asyncio.Event().wait()
        return await answer(prompt, num_output, on_tokens)

    server.ask = ask
    records = asyncio.run(load.run())
    assert len(records) in (3, 4), "the other client may be just through"
    assert all(record.is_ok for record in records)
    tally = load.tally
    assert tally.is_interrupted
    assert tally.num_under_way + len(records) == tally.num_sent < tally.num_requests == 12


def test_a_conversation_does_not_go_on_without_its_answers_tokens():
    server = Server(Clock())

    async def ask(prompt, num_output, on_tokens):
        on_tokens(num_output)
        return Answered(len(prompt))

    server.ask = ask
    assert run(server, sessions(1), Arrivals())[0].is_ok, "a single turn needs none"
    with pytest.raises(InvalidRequestError, match="token ids"):
        run(server, sessions(2, turns=2), Arrivals(concurrency=1))


def test_answers_that_end_early_are_counted():
    server = Server(Clock())
    asked = [Session([Turn([Part((0, i), 4)], num_output)]) for i, num_output in enumerate((2, 3, 9))]
    assert [record.is_short for record in run(server, asked, Arrivals())] == [False, True, True]


@pytest.mark.parametrize(("rate", "count"), [(1e-300, 2), (1e-6, 10)])
def test_a_load_that_takes_months_is_refused(rate, count):
    with pytest.raises(InvalidRequestError, match="days"):
        Arrivals(rate=rate).check(sessions(count))
    Arrivals(rate=rate).check(sessions(1))
    Arrivals(concurrency=1).check(sessions(count))


def test_answers_are_read_while_others_are_still_being_sent():
    server = Server(Clock())
    answered: list[int] = []
    answer = server.ask

    async def ask(prompt, num_output, on_tokens):
        result = await answer(prompt, num_output, on_tokens)
        answered.append(len(server.asked))
        return result

    server.ask = ask
    run(server, sessions(50), Arrivals(rate=float("inf")))
    assert answered[0] < 10, "not only when all 50 were sent"
