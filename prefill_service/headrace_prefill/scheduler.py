"""Which prompts a step computes. Pure: no torch, no grpc, no clock. Engine thread only.

    WAITING ──pages for the whole prompt──► RUNNING ──last chunk sampled──► PUBLISHED
       │ └──pages, some cached elsewhere──► FETCHING ──fetched, or not──► RUNNING  │
       │                                       └──free──► QUARANTINED ──drained──► gone, pages free
       └──────────────┴───────── free, or a failed step ────────┴──────────► gone, pages free

A step goes on with what runs, oldest first, then admits from the queue's head while token and sequence budgets last;
the groups that sequences belong to, their routers, take turns, and within one the first that came is first. One gets
all its pages at once, so two half-done prompts can't wait for each other.
Full pages are sealed when the chunk that filled them is computed, their first layers at its stops before that, those of
the prefix cache at admission, the rest with the first token: from then on nothing writes them, and their ids stay, also
where an equal page was cached first. They stay until the lease table says `free`; nothing else frees them. A step that
raised is run again: what was sealed at its stops is then another page, and the sequence is lost to its taker. What was
computed stays in the prefix cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from headrace_core.batch.finish import FinishRule
from headrace_core.batch.scheduler import Load
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import Chunk, ForwardPlan, Mark, SamplingRow, StepPlan, StepResult
from headrace_core.batch.step_book import Failed, FetchReady, StepBook
from headrace_core.batch.step_budget import StepBudget
from headrace_core.batch.turn_queue import TurnQueue
from headrace_core.errors import HandoffLostError
from headrace_core.kv.sequence_pages import PageAllocator, SequencePages
from headrace_core.request import SampledToken

from headrace_prefill.events import Admitted, Prefilled, PrefillEvent, Sealed
from headrace_prefill.layer_stops import LayerStops
from headrace_prefill.scheduled import Scheduled, State


class PrefillScheduler:
    """See the module. A sequence's key is its caller's, and rises with arrival. It is its engine's `LayerWatch`."""

    def __init__(
        self,
        pages: PageAllocator,
        limits: ModelLimits,
        *,
        max_step_tokens: int,
        max_step_sequences: int,
        max_waiting_sequences: int,
        layer_stops: LayerStops | None = None,
        runs_mtp: bool = False,
    ) -> None:
        """Args: `layer_stops` None: pages are sealed when their step is over. `runs_mtp` as `ForwardPlan`'s."""
        self.pages = pages
        self._layer_stops = layer_stops
        self._runs_mtp = runs_mtp
        self._limits = limits
        self._max_step_tokens = max_step_tokens
        self._max_step_sequences = max_step_sequences
        self._sequences: dict[int, Scheduled] = {}
        self._waiting: TurnQueue[Scheduled] = TurnQueue()
        self._fetching: dict[int, Scheduled] = {}
        self._running: dict[int, Scheduled] = {}
        """In order of admission."""
        self._book = StepBook[PrefillEvent](pages, max_waiting_sequences=max_waiting_sequences)

    def add(
        self,
        key: int,
        spec: SequenceSpec,
        now: float,
        *,
        group: int = 0,
        num_have_pages: int = 0,
        num_cached_elsewhere: int = 0,
    ) -> None:
        """Queue a checked sequence, or refuse it with a `Failed` event: QUEUE_FULL, NO_FREE_PAGES.

        Its first `num_have_pages` are with its taker, and are not sealed. Its first `num_cached_elsewhere` tokens are
        fetched if that is a page more at least than is cached here when it is its turn.
        """
        if self._book.admits(key, num_tokens=len(spec.token_ids), num_waiting=len(self._waiting)):
            most = len(spec.token_ids) - 1  # one is left to compute
            num_pages = min(num_cached_elsewhere, most) // self.pages.page_size
            sequence = Scheduled(key, group, spec, now, num_cached_elsewhere=num_pages, num_sealed=num_have_pages)
            self._sequences[key] = sequence
            self._waiting.add(sequence)

    def fetched(self, key: int, num_tokens: int, now: float) -> None:
        """Go on with a sequence whose first `num_tokens` were brought here and verified; 0: it was not to be.

        Nothing may land in its pages any more. Unknown keys are no error.
        """
        sequence = self._sequences.get(key)
        if sequence is None or sequence.state is not State.FETCHING:
            return
        assert sequence.pages is not None, "admitted"
        del self._fetching[key]
        num_computed = max(num_tokens, len(sequence.pages.nodes) * self.pages.page_size)
        self.pages.commit(sequence.pages, sequence.spec.token_ids, num_computed)
        self._run(sequence, sequence.pages, num_computed, now)

    def drained(self, key: int) -> None:
        """Free the pages of a sequence that was freed while they were fetched into. Other keys are no error."""
        sequence = self._sequences.get(key)
        if sequence and sequence.state is State.QUARANTINED:
            self._free(sequence)

    def free(self, key: int) -> None:
        """Forget a sequence in whatever state and free its pages: the only way there is. Unknown keys are no error.

        Where bytes may still land in them, they are set aside until `drained`.
        """
        sequence = self._sequences.get(key)
        if sequence is None or sequence.state is State.QUARANTINED:
            return
        if sequence.state is State.FETCHING:
            assert sequence.pages is not None, "admitted"
            sequence.state = State.QUARANTINED
            del self._fetching[key]
            self.pages.quarantine(sequence.pages)
        else:
            self._free(sequence)

    def _free(self, sequence: Scheduled) -> None:
        key = sequence.key
        del self._sequences[key]
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        self._running.pop(key, None)
        if sequence.pages:
            if sequence.pages.page_ids:  # it did not fail: what it computed may be found again
                self.pages.commit(sequence.pages, sequence.spec.token_ids, sequence.num_computed)
            self.pages.free(sequence.pages)

    def plan(self, now: float) -> StepPlan | None:
        """Choose chunks of at most `max_step_tokens` together; None when nothing can be computed."""
        chunks: list[Chunk] = []
        zero_page_ids: list[int] = []
        budget = StepBudget(self._max_step_tokens, self._work())

        def choose(sequence: Scheduled, most: int) -> None:
            if most:
                zero_page_ids.extend(self._to_zero(sequence))
                chunks.append(self._chunk(sequence, most))
                budget.take(chunks[-1].lane, len(chunks[-1].token_ids))

        for sequence in self._running.values():
            if not budget.num_left or len(chunks) == self._max_step_sequences:
                break
            assert sequence.pages is not None, "a running sequence has pages"
            choose(sequence, budget.left(sequence.pages.lane))
        while budget.num_left and self._waiting and len(chunks) < self._max_step_sequences:
            sequence = self._waiting.head()
            if not self._admit(sequence, now):
                break
            if sequence.state is State.RUNNING:
                choose(sequence, budget.num_left)
        sampling = {c.key: self._sampling(self._sequences[c.key].spec) for c in chunks if c.is_sampled}
        return self._book.plan(ForwardPlan(chunks, zero_page_ids, self._stops(chunks), self._runs_mtp), sampling)

    def _work(self) -> Iterator[tuple[int, int]]:
        """Return (lane, tokens) of who runs, and of the next that waits in each lane in which it would have room."""
        for sequence in self._running.values():
            assert sequence.pages is not None, "a running sequence has pages"
            yield sequence.pages.lane, sequence.num_left
        head = self._waiting.head().num_tokens if self._waiting else 0
        for lane in range(self.pages.num_lanes) if head else ():
            if self.pages.num_available_in(lane) >= self.pages.pages_for(head):
                yield lane, head

    def layers_done(self, num_layers: int, mark: Mark | None) -> None:
        """See `LayerWatch`: seal what is worth a run in these layers."""
        for chunk in self._book.planned.chunks:
            sequence = self._sequences[chunk.key]
            if self._is_worth_sealing(sequence, chunk, num_layers):
                assert sequence.pages is not None, "a running sequence has pages"
                end = self._num_written(sequence, chunk)
                self._tell_sealed(sequence, sequence.pages, end, num_layers, mark)
                sequence.num_sealed_layers = num_layers

    def step_raised(self) -> None:
        """See `LayerWatch`: whoever takes what was sealed at the stops is to be refused."""
        for chunk in self._book.planned.chunks:
            sequence = self._sequences[chunk.key]
            if sequence.num_sealed_layers and not sequence.is_lost:
                assert sequence.pages is not None, "a running sequence has pages"
                sequence.is_lost = True
                written = sequence.pages.page_ids[sequence.num_sealed : self._num_written(sequence, chunk)]
                self.pages.pool.renew(written, sequence.pages.owner)

    def apply(self, result: StepResult, now: float) -> None:
        """Advance the planned sequences; publish those whose first token was sampled, end those that failed."""
        for chunk in self._book.take_planned().chunks:
            sequence = self._sequences[chunk.key]
            assert sequence.pages is not None, "a running sequence has pages"
            error = result.failures.get(chunk.key)
            if error is not None:
                self.pages.discard(sequence.pages)
                self.free(chunk.key)
                self._book.tell(Failed(chunk.key, error))
                continue
            sequence.num_computed += len(chunk.token_ids)
            sequence.num_chunks += 1
            self.pages.commit(sequence.pages, sequence.spec.token_ids, sequence.num_computed, keeps_ids=True)
            if sequence.is_lost:
                self.free(chunk.key)
                self._book.tell(Failed(chunk.key, _written_again()))
            elif sequence.num_left:
                self._seal(sequence, sequence.pages, sequence.num_computed // self.pages.page_size)
            else:
                self._publish(sequence, sequence.pages, result.tokens[chunk.key][0], now)

    def running_keys(self) -> set[int]:
        """Return the keys of the sequences that may have rows."""
        return set(self._running)

    def take_events(self) -> Sequence[PrefillEvent]:
        """Return what happened since the last call."""
        return self._book.take_events()

    def load(self) -> Load:
        """Return what is held now."""
        return self._book.load(
            num_running=len(self._running),
            num_waiting=len(self._waiting) + len(self._fetching),
            num_waiting_tokens=sum(s.num_tokens for s in (*self._waiting, *self._fetching.values()))
            + sum(s.num_left for s in self._running.values()),
            num_sequences=len(self._sequences),
        )

    def check_integrity(self) -> None:
        """Assert that no page is lost or held twice, and that the queues agree."""
        self._book.check_integrity(s.pages for s in self._sequences.values() if s.pages)
        states = [sequence.state for sequence in self._sequences.values()]
        assert states.count(State.WAITING) == len(self._waiting), "the waiting queue differs"
        assert states.count(State.RUNNING) == len(self._running), "the running queue differs"
        assert states.count(State.FETCHING) == len(self._fetching), "those that are fetched differ"
        num_others = len(states) - len(self._waiting) - len(self._fetching) - len(self._running)
        num_held = states.count(State.PUBLISHED) + states.count(State.QUARANTINED)
        assert num_held == num_others, "a sequence is in two queues"

    def _admit(self, sequence: Scheduled, now: float) -> bool:
        # Room says little of work: pages are held until they are handed off, long after they were computed.
        work = Counter[int]()
        for running in self._running.values() if self.pages.num_lanes > 1 else ():
            assert running.pages is not None, "a running sequence has pages"
            work[running.pages.lane] += running.num_left
        pages = self.pages.admit(sequence.key, sequence.spec.token_ids, work=work.__getitem__)
        if pages is None:
            return False
        self._waiting.take()
        sequence.pages, num_cached = pages, len(pages.nodes) * self.pages.page_size
        if sequence.num_cached_elsewhere > len(pages.nodes):
            sequence.state = State.FETCHING
            self._fetching[sequence.key] = sequence
            page_ids = tuple(pages.page_ids[: sequence.num_cached_elsewhere])
            self._book.tell(FetchReady(sequence.key, page_ids, num_cached))
        else:
            self._run(sequence, pages, num_cached, now)
        return True

    def _run(self, sequence: Scheduled, pages: SequencePages, num_cached: int, now: float) -> None:
        sequence.num_computed = sequence.num_cached = num_cached
        sequence.state, sequence.started_s = State.RUNNING, now
        self._running[sequence.key] = sequence
        self._book.tell(Admitted(sequence.key, num_cached, now - sequence.added_s))
        self._seal(sequence, pages, len(pages.nodes))

    def _to_zero(self, sequence: Scheduled) -> list[int]:
        """Return the page of which slots will be left unused, with the sequence's first chunk."""
        assert sequence.pages is not None, "a running sequence has pages"
        is_first = sequence.num_computed == sequence.num_cached
        return sequence.pages.page_ids[-1:] if is_first and sequence.num_tokens % self.pages.page_size else []

    def _chunk(self, sequence: Scheduled, budget: int) -> Chunk:
        assert sequence.pages is not None, "a running sequence has pages"
        spec, start = sequence.spec, sequence.num_computed
        end = min(start + budget, sequence.num_tokens)
        return Chunk(
            key=sequence.key,
            token_ids=spec.token_ids[start:end],
            start=start,
            page_ids=sequence.pages.page_ids,
            is_sampled=end == sequence.num_tokens,
            request_id=spec.request_id,
            next_id=spec.token_ids[end] if self._runs_mtp and end < sequence.num_tokens else None,
            lane=sequence.pages.lane,
        )

    def _num_written(self, sequence: Scheduled, chunk: Chunk) -> int:
        """Return how many pages nothing writes any more once the chunk is computed."""
        end = chunk.start + len(chunk.token_ids)
        return self.pages.pages_for(end) if end == sequence.num_tokens else end // self.pages.page_size

    def _is_worth_sealing(self, sequence: Scheduled, chunk: Chunk, num_layers: int) -> bool:
        num_pages = self._num_written(sequence, chunk) - sequence.num_sealed
        stops = self._layer_stops
        return stops is not None and stops.is_worth(num_layers - sequence.num_sealed_layers, num_pages)

    def _stops(self, chunks: Sequence[Chunk]) -> tuple[int, ...]:
        """Return the stops at which there is something to seal."""
        if self._layer_stops is None:
            return ()
        pairs = [(self._sequences[chunk.key], chunk) for chunk in chunks]
        return tuple(
            stop for stop in self._layer_stops.stops if any(self._is_worth_sealing(*pair, stop) for pair in pairs)
        )

    def _sampling(self, spec: SequenceSpec) -> SamplingRow:
        return SamplingRow(
            params=spec.params,
            prompt_token_ids=spec.token_ids[: spec.num_prompt_tokens],
            output_token_ids=spec.token_ids[spec.num_prompt_tokens :],
            sample_index=spec.sample_index,
            position=len(spec.token_ids),
            eos_token_ids=self._limits.eos_token_ids,
        )

    def _publish(self, sequence: Scheduled, pages: SequencePages, token: SampledToken, now: float) -> None:
        spec = sequence.spec
        del self._running[sequence.key]
        sequence.state = State.PUBLISHED
        num_tokens = sequence.num_tokens + 1
        finish = FinishRule(spec.params, self._limits).reason(
            token.token_id, num_output_tokens=num_tokens - spec.num_prompt_tokens, num_tokens=num_tokens
        )
        self._book.tell(
            Prefilled(
                key=sequence.key,
                token_ids=spec.token_ids,
                token=token,
                finish=finish,
                num_pages=len(pages.page_ids),
                num_cached_tokens=sequence.num_cached,
                num_chunks=sequence.num_chunks,
                compute_s=now - sequence.started_s,
            )
        )
        if not finish:
            self._seal(sequence, pages, len(pages.page_ids))

    def _seal(self, sequence: Scheduled, pages: SequencePages, end: int) -> None:
        """Tell of the pages up to number `end` that are sealed now, in the layers that were not."""
        if sequence.num_sealed < end:
            self._tell_sealed(sequence, pages, end)
            sequence.num_sealed, sequence.num_sealed_layers = end, 0

    def _tell_sealed(
        self,
        sequence: Scheduled,
        pages: SequencePages,
        end: int,
        end_layer: int | None = None,
        mark: Mark | None = None,
    ) -> None:
        start, first_layer = sequence.num_sealed, sequence.num_sealed_layers
        sealed = tuple((page_id, self.pages.pool.generation(page_id)) for page_id in pages.page_ids[start:end])
        self._book.tell(Sealed(sequence.key, start, sealed, first_layer, end_layer, mark))


def _written_again() -> HandoffLostError:
    return HandoffLostError("STALE_PAGE", "a step raised after pages of its first layers were sealed; prefill again")
