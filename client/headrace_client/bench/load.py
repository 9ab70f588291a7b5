"""Asks a server, in an open or a closed loop.

*Open*: requests are due at times that do not depend on the server (a trace's, or drawn for a rate), and every latency
counts from then. *Closed*: so many clients, each of which asks again once it is answered; what they see are latencies
under a load that gives way, which says nothing of requests that would have come meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from headrace_core.errors import HeadraceError

from headrace_client.bench.prompts import Session
from headrace_client.bench.record import Record
from headrace_client.bench.target import Answered, Target


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When sessions begin. Without a rate: as their trace says, else all at once, or in a closed loop.

    `rate` is sessions a second; gaps are gamma distributed with shape `burstiness`: 1 is Poisson, less is burstier,
    infinite is even. `concurrency` bounds the requests under way. In an open loop one that waits for its place counts
    from when it was due; without a rate or a trace's times that many clients make a closed loop.
    """

    rate: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    seed: int = 0

    def times_s(self, sessions: Sequence[Session]) -> list[float] | None:
        """Return when each session is due, seconds from the beginning; None for a closed loop."""
        if self.rate is not None:
            return self._drawn_s(len(sessions), self.rate)
        recorded = [session.arrival_s for session in sessions if session.arrival_s is not None]
        if len(recorded) == len(sessions):
            return recorded
        return None if self.concurrency is not None else [0.0] * len(sessions)

    def _drawn_s(self, count: int, rate: float) -> list[float]:
        if rate == float("inf"):
            return [0.0] * count
        gaps = np.full(count, 1 / rate)
        if self.burstiness != float("inf"):
            random = np.random.default_rng(self.seed)
            gaps = random.gamma(self.burstiness, 1 / (rate * self.burstiness), count)
        times: list[float] = (np.cumsum(gaps) - gaps[0]).tolist()
        return times


@dataclass(slots=True)
class Tally:
    """What is known while it runs."""

    num_requests: int
    num_sent: int = 0
    num_tokens: int = 0
    records: list[Record] = field(default_factory=list[Record])
    """Of those that ended, in that order."""


class Load:
    """One run."""

    def __init__(
        self,
        target: Target,
        sessions: Sequence[Session],
        arrivals: Arrivals,
        *,
        vocab_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tally = Tally(sum(len(session.turns) for session in sessions))
        self._target = target
        self._sessions = sessions
        self._arrivals = arrivals
        self._vocab_size = vocab_size
        self._clock = clock
        self._places = asyncio.Semaphore(arrivals.concurrency or self.tally.num_requests or 1)
        self._began_s = 0.0
        self._num_begun = 0

    async def run(self) -> list[Record]:
        """Ask everything; return what became of each request, in the order in which they were due."""
        self._began_s = self._clock()
        times_s = self._arrivals.times_s(self._sessions)
        if times_s is None:
            left = iter(self._sessions)
            async with asyncio.TaskGroup() as clients:
                for _ in range(min(self._arrivals.concurrency or 1, len(self._sessions))):
                    clients.create_task(self._client(left))
        else:
            async with asyncio.TaskGroup() as under_way:
                for session, due_s in zip(self._sessions, times_s, strict=True):
                    early_s = due_s - self._now_s()
                    if early_s > 0:
                        await asyncio.sleep(early_s)
                    under_way.create_task(self._session(session, due_s))
        return sorted(self.tally.records, key=lambda record: record.index)

    async def _client(self, sessions: Iterator[Session]) -> None:
        for session in sessions:
            await self._session(session, self._now_s())

    async def _session(self, session: Session, due_s: float) -> None:
        prompt: list[int] = []
        for turn in session.turns:
            prompt += turn.tokens(self._vocab_size)
            index, self._num_begun = self._num_begun, self._num_begun + 1
            async with self._places:
                record, answered = await self._ask(Record(index, due_s, 0.0), prompt, turn.num_output)
            self.tally.records.append(record)
            if answered is None:  # who was not answered does not go on
                self.tally.num_requests -= len(session.turns) - session.turns.index(turn) - 1
                return
            prompt += answered.token_ids
            due_s = self._now_s()

    async def _ask(self, record: Record, prompt: list[int], num_output: int) -> tuple[Record, Answered | None]:
        tally, deltas = self.tally, record.deltas

        def on_tokens(count: int) -> None:
            tally.num_tokens += count
            deltas.append((self._now_s(), count))

        record.num_prompt = len(prompt)
        record.sent_s = self._now_s()
        tally.num_sent += 1
        answered = None
        try:
            answered = await self._target.ask(list(prompt), num_output, on_tokens)
            record.num_prompt, record.num_cached = answered.num_prompt or len(prompt), answered.num_cached
            if not deltas:
                record.error = "EMPTY"
            elif answered.num_output is not None and answered.num_output > record.num_output:
                at_s, count = deltas[-1]  # tokens without text, of which no event told
                deltas[-1] = (at_s, count + answered.num_output - record.num_output)
        except HeadraceError as error:
            record.error = error.reason
        record.end_s = self._now_s()
        return record, answered

    def _now_s(self) -> float:
        return self._clock() - self._began_s
