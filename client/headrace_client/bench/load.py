"""Asks a server, in an open or a closed loop.

*Open*: requests are due at times that do not depend on the server (a trace's, or drawn for a rate), and every latency
counts from then. *Closed*: so many clients, each of which asks again once it is answered; what they see are latencies
under a load that gives way, which says nothing of requests that would have come meanwhile.

A run may be stopped: what was answered until then counts, what is under way is cancelled and does not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from headrace_core.errors import HeadraceError, InvalidRequestError

from headrace_client.bench.prompts import Session
from headrace_client.bench.record import Record
from headrace_client.bench.target import Answered, Target

_MONTH_S = 30 * 86400.0


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

    def check(self, sessions: Sequence[Session]) -> None:
        """See that the last session is due within a month. Raises InvalidRequestError, BAD_OPTION."""
        last_s = max(self.times_s(sessions) or [0.0])
        if not last_s <= _MONTH_S:
            problem = f"the last request would be due after {last_s / 86400:.3g} days: ask faster, or less"
            raise InvalidRequestError("BAD_OPTION", problem)

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
    said: dict[str, str] = field(default_factory=dict[str, str])
    """Of each reason to fail what the first error said."""
    is_interrupted: bool = False

    @property
    def num_under_way(self) -> int:
        """Requests that were sent and did not end."""
        return self.num_sent - len(self.records)


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
        self._asking: asyncio.Task[None] | None = None

    async def run(self) -> list[Record]:
        """Ask everything; return what became of each request, in the order in which they were due.

        Raises:
            InvalidRequestError: BAD_OPTION, a conversation can't go on.
        """
        self._began_s = self._clock()
        self._asking = asyncio.create_task(self._ask_all())
        try:
            await self._asking
        except ExceptionGroup as group:  # of clients that could not go on, the first
            raise group.exceptions[0] from None
        except asyncio.CancelledError:
            self._asking.cancel()
            if not self.tally.is_interrupted:
                raise
        return sorted(self.tally.records, key=lambda record: record.index)

    def stop(self) -> None:
        """Ask nothing more, cancel what is under way, and let `run` return."""
        self.tally.is_interrupted = True
        if self._asking is not None:
            self._asking.cancel()

    async def _ask_all(self) -> None:
        times_s = self._arrivals.times_s(self._sessions)
        if times_s is None:
            left = iter(self._sessions)
            async with asyncio.TaskGroup() as clients:
                for _ in range(min(self._arrivals.concurrency or 1, len(self._sessions))):
                    clients.create_task(self._client(left))
        else:
            async with asyncio.TaskGroup() as under_way:
                for session, due_s in zip(self._sessions, times_s, strict=True):
                    # Not early: answers are read between any two that are sent, or they would seem to come late.
                    await asyncio.sleep(max(0.0, due_s - self._now_s()))
                    under_way.create_task(self._session(session, due_s))

    async def _client(self, sessions: Iterator[Session]) -> None:
        for session in sessions:
            await self._session(session, self._now_s())

    async def _session(self, session: Session, due_s: float) -> None:
        prompt: list[int] = []
        for place, turn in enumerate(session.turns):
            prompt += turn.tokens(self._vocab_size)
            index, self._num_begun = self._num_begun, self._num_begun + 1
            async with self._places:
                record, answered = await self._ask(Record(index, due_s, 0.0), prompt, turn.num_output)
            self.tally.records.append(record)
            num_left = len(session.turns) - place - 1
            if answered is None:  # who was not answered does not go on
                self.tally.num_requests -= num_left
                return
            if num_left and not answered.token_ids:
                problem = "a conversation goes on from its answers' token ids, which this server does not tell"
                raise InvalidRequestError("BAD_OPTION", f"{problem}; another --dataset needs none")
            prompt += answered.token_ids
            due_s = self._now_s()

    async def _ask(self, record: Record, prompt: list[int], num_output: int) -> tuple[Record, Answered | None]:
        tally, deltas = self.tally, record.deltas
        record.num_asked = num_output

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
                tally.said.setdefault("EMPTY", "the answer had no tokens")
            elif answered.num_output is not None and answered.num_output > record.num_output:
                _spread(deltas, answered.num_output - record.num_output)
        except HeadraceError as error:
            record.error = error.reason
            tally.said.setdefault(error.reason, str(error))
        record.end_s = self._now_s()
        return record, answered

    def _now_s(self) -> float:
        return self._clock() - self._began_s


def _spread(deltas: list[tuple[float, int]], count: int) -> None:
    """Add tokens of which no event told to those that came, evenly; what is left over to the last of them."""
    each, left = divmod(count, len(deltas))
    for place, (at_s, told) in enumerate(deltas):
        deltas[place] = (at_s, told + each + (place >= len(deltas) - left))
