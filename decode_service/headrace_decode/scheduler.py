"""Which sequences a step advances. Pure: no torch, no grpc, no clock. One thread at a time, see `engine.py`.

    WAITING ──pages, remote──► TRANSFERRING ──arrived──► RUNNING ──finished, failed──► gone, pages free
     │ │ ▲                          │ abort               │  │
     │ │ └──────────────────────────┼──pre-empted─────────┤  │
     │ │                            ▼                     │  │
     │ │                       QUARANTINED ──drained──► gone │
     │ └──────────abort───────────────────────────────────┼──┴──► gone, pages free
     └──pages, some elsewhere──► FETCHING                 └──set aside──► ASIDE ──abort──► gone, pages free

FETCHING leads to where WAITING would have with what was fetched in the prefix cache; aborted, to QUARANTINED. What is
ASIDE goes on at another worker, which takes its pages; a WAITING one can be set aside too, and has none.
A RUNNING sequence computes its tokens from `num_computed` on: one in decode; many when this worker prefills it, or
computes it again after pre-emption. Decode rows come first, then prompt chunks while the token budget lasts.
When a running sequence needs a page and none is left in its lane, the youngest running there gives its pages back and
waits, with all its tokens, to be computed again, where there is room: no token is lost or emitted twice. One that
outgrows a whole lane ends with NO_FREE_PAGES. Pages under transfer are never taken away: bytes may still land in them.

A sequence belongs to a group, its router's session. Groups take turns at admission. The rows of one that is paused,
because its router does not read, are left out of steps and keep their pages.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from headrace_core.batch.finish import FinishRule
from headrace_core.batch.scheduler import Load
from headrace_core.batch.spec import ModelLimits, SequenceSpec
from headrace_core.batch.step import COMING, Chunk, ForwardPlan, StepPlan, StepResult
from headrace_core.batch.step_book import Failed, FetchReady, StepBook
from headrace_core.batch.step_budget import StepBudget
from headrace_core.batch.turn_queue import TurnQueue
from headrace_core.errors import HeadraceError, OverloadedError
from headrace_core.kv.sequence_pages import PageAllocator
from headrace_core.request import SampledToken

from headrace_decode.events import DecodeEvent, Output, PagesReady, Preempted, Scored, Started
from headrace_decode.held_prefixes import HeldPrefixes
from headrace_decode.scheduled import MOVING, Scheduled, State
from headrace_decode.speculation import NO_DRAFTS, Speculation

_RESERVE_SHARE = 4
"""For every so many running sequences one page stays free at admission, since each will soon need one more."""
_age = attrgetter("key")


class DecodeScheduler:
    """See the module. A sequence's key is its caller's, and rises with arrival: a higher key is younger."""

    def __init__(
        self,
        pages: PageAllocator,
        limits: ModelLimits,
        *,
        max_step_tokens: int,
        max_step_sequences: int,
        max_waiting_sequences: int,
        speculation: Speculation = NO_DRAFTS,
    ) -> None:
        self.pages = pages
        self._speculation = speculation
        self._limits = limits
        self._max_step_tokens = max_step_tokens
        self._max_running = min(max_step_sequences, max_step_tokens)  # more rows than tokens never all run
        self._sequences: dict[int, Scheduled] = {}
        self._waiting: TurnQueue[Scheduled] = TurnQueue()
        self._running: list[Scheduled] = []  # oldest first
        self._paused: set[int] = set()
        self._num_transferring = 0
        self._has_made_room = False
        self._book = StepBook[DecodeEvent](pages, max_waiting_sequences=max_waiting_sequences)
        self.prefixes = HeldPrefixes(pages, self._book.tell)

    def add(
        self,
        key: int,
        spec: SequenceSpec,
        now: float,
        *,
        group: int = 0,
        has_handoff: bool = False,
        local_below: int = 0,
        num_cached_elsewhere: int = 0,
    ) -> None:
        """Queue a checked sequence, or refuse it with a `Failed` event: QUEUE_FULL, NO_FREE_PAGES.

        With `has_handoff`, what the prefix cache lacks of `spec.token_ids` when it is its turn comes by transfer, if it
        is more than `local_below` tokens; otherwise it is computed here. Before that its first `num_cached_elsewhere`
        tokens are fetched, if that is a page more at least than is cached here.
        """
        if self._book.admits(key, num_tokens=len(spec.token_ids) + 1, num_waiting=len(self._waiting)):
            sequence = self._sequences[key] = Scheduled.of(
                spec,
                key=key,
                group=group,
                has_handoff=has_handoff,
                local_below=local_below,
                finish=FinishRule(spec.params, self._limits),
                drafting=self._speculation.drafting(),
                added_s=now,
            )
            most = sequence.prompt.most_cached(len(spec.token_ids) - 1)  # one is left to compute
            sequence.num_cached_elsewhere = min(num_cached_elsewhere, most) // self.pages.page_size
            self._waiting.add(sequence)

    def admit(self, now: float) -> None:
        """Give pages to the queue's head while there are some; a step under way does not mind."""
        while self._waiting and len(self._running) + self._num_transferring < self._max_running:
            sequence = self._waiting.head()
            # Whoever computes here computes a token at least.
            num_left = 0 if sequence.has_handoff and not sequence.local_below else 1
            num_tokens = len(sequence.token_ids)
            num_left = num_tokens - sequence.prompt.most_cached(num_tokens - num_left)
            pages = self.pages.admit(sequence.key, sequence.token_ids, num_left=num_left, num_kept=self._num_kept)
            if pages is None:
                return
            self._waiting.take()
            num_have = len(pages.nodes) * self.pages.page_size
            sequence.pages, sequence.num_cached = pages, num_have
            if not sequence.is_started:
                sequence.queue_s = now - sequence.added_s
            if sequence.num_cached_elsewhere > len(pages.nodes):
                sequence.state = State.FETCHING
                self._num_transferring += 1
                wanted = tuple(pages.page_ids[: sequence.num_cached_elsewhere])
                self._book.tell(FetchReady(sequence.key, wanted, num_have))
            else:
                self._go_on(sequence, num_have)

    def fetched(self, key: int, num_tokens: int, now: float) -> None:
        """Go on with a sequence whose first `num_tokens` were brought here and verified; 0: it was not to be.

        Nothing may land in its pages any more. Unknown keys are no error.
        """
        sequence = self._sequences.get(key)
        if sequence is None or sequence.state is not State.FETCHING:
            return
        self._num_transferring -= 1
        sequence.num_cached_elsewhere = 0
        num_have = max(num_tokens, len(sequence.pages.nodes) * self.pages.page_size)
        self.pages.commit(sequence.pages, sequence.token_ids, num_have)
        self._go_on(sequence, num_have)

    def arrived(self, key: int, first_token_id: int) -> None:
        """Join a sequence whose pages arrived and were verified, and of which one token more is known.

        Unknown keys are no error.
        """
        sequence = self._sequences.get(key)
        if sequence is None or sequence.state is not State.TRANSFERRING:
            return
        sequence.num_computed = len(sequence.spec.token_ids)
        sequence.has_handoff = False
        sequence.token_ids.append(first_token_id)
        sequence.output_ids.append(first_token_id)
        self._num_transferring -= 1
        self.pages.commit(sequence.pages, sequence.token_ids, sequence.num_computed)
        self._run(sequence)

    def abort(self, key: int) -> None:
        """Forget a sequence; pages under transfer are set aside until `drained`. Unknown keys are no error."""
        sequence = self._sequences.get(key)
        if sequence is None:
            return
        if sequence.state in MOVING:
            sequence.state = State.QUARANTINED
            self._num_transferring -= 1
            self.pages.quarantine(sequence.pages)
        elif sequence.state is not State.QUARANTINED:
            self._free(sequence)

    def set_aside(self, key: int) -> None:
        """Compute a sequence no further, but keep its pages until `abort`. Not one whose pages are under transfer.

        Unknown keys are no error.
        """
        sequence = self._sequences.get(key)
        if sequence is not None and sequence.state in (State.WAITING, State.RUNNING):
            self._leave(sequence)
            sequence.state = State.ASIDE

    def drained(self, key: int) -> None:
        """Free an aborted sequence's pages: nothing can land in them any more. Other keys are no error."""
        sequence = self._sequences.get(key)
        if sequence and sequence.state is State.QUARANTINED:
            self._free(sequence)

    def pause(self, group: int) -> None:
        """Leave the group's rows out of steps until `resume`; they keep their pages. Idempotent."""
        self._paused.add(group)

    def resume(self, group: int) -> None:
        """Take the group's rows into steps again. Idempotent."""
        self._paused.discard(group)

    def plan(self, now: float) -> StepPlan | None:
        """Choose rows and chunks of at most `max_step_tokens` together; None when nothing can be computed."""
        chunks = self._choose(now)
        while not chunks and self._has_made_room:
            chunks = self._choose(now)  # what gave way left pages that a waiting sequence can have
        chunks = self._speculation.with_drafts(chunks, self._sequences, self.pages)
        sampling = {c.key: self._sequences[c.key].sampling(self._limits) for c in chunks if c.is_sampled}
        return self._book.plan(ForwardPlan(chunks, runs_mtp=self._speculation.runs_module(chunks)), sampling)

    def plan_ahead(self, now: float) -> StepPlan | None:
        """Choose the step after the one under way as if that were over and had ended nobody but by length.

        Tokens that it samples are COMING. None if that step must be over first: a sequence needs a page and none is
        left, one failed, or it has drafts, of which nobody knows yet how much is right, or makes those of the next.
        """
        planned = [(self._sequences.get(chunk.key), chunk) for chunk in self._book.planned.chunks]
        over = [(s, chunk) for s, chunk in planned if s is not None and s.state is State.RUNNING]
        if self._book.is_spoilt or self._book.planned.has_guesses:
            return None
        for sequence, chunk in over:
            sequence.num_computed += len(chunk.token_ids)
            sequence.token_ids += [COMING] * chunk.is_sampled
        try:
            chunks = self._choose(now, is_ahead=True)
            sampling = {c.key: self._sequences[c.key].sampling(self._limits) for c in chunks if c.is_sampled}
        finally:
            for sequence, chunk in over:
                sequence.num_computed -= len(chunk.token_ids)
                if chunk.is_sampled:
                    sequence.token_ids.pop()
        return self._book.plan_ahead(ForwardPlan(chunks), sampling)

    def running_keys(self) -> set[int]:
        """Return the keys of the sequences that may have rows."""
        return {sequence.key for sequence in self._running}

    def apply(self, result: StepResult, now: float) -> None:
        """Advance the sequences of the oldest step under way by what was computed and sampled; end those that failed.

        Who ended or left since it was planned has computed in vain.
        """
        for chunk in self._book.take_planned().chunks:
            sequence = self._sequences.get(chunk.key)
            if sequence is None or sequence.state is not State.RUNNING:
                continue
            error = result.failures.get(chunk.key)
            if error is not None:
                self._book.give_back(sequence.key, sequence.pages, is_discarded=True)
                self._fail(sequence, error)
                continue
            scored = result.prompt_logprobs.get(chunk.key)
            if scored is not None:
                sequence.prompt.take(len(scored.logprobs))
                self._book.tell(Scored(chunk.key, scored))
            tokens = result.tokens[chunk.key] if chunk.is_sampled else []
            has_ended = self._emit(sequence, tokens)
            sequence.advance(chunk, len(tokens), result.guesses.get(chunk.key, ()))
            keeps_ids = self._book.is_under_way(chunk.key)
            self.pages.commit(sequence.pages, sequence.token_ids, sequence.num_computed, keeps_ids=keeps_ids)
            if has_ended:
                self._free(sequence)

    def take_events(self) -> Sequence[DecodeEvent]:
        """Return what happened since the last call."""
        return self._book.take_events()

    def load(self) -> Load:
        """Return what is held now."""
        return self._book.load(
            num_running=len(self._running),
            num_waiting=len(self._waiting) + self._num_transferring,
            num_waiting_tokens=sum(s.num_left for s in self._waiting if not s.has_handoff)
            + sum(s.num_left for s in self._running if s.num_left > 1),
            num_sequences=len(self._sequences),
        )

    def check_integrity(self) -> None:
        """Assert that no page is lost or held twice, and that the queues agree."""
        self._book.check_integrity([*(s.pages for s in self._sequences.values()), *self.prefixes.held])
        states = [sequence.state for sequence in self._sequences.values()]
        assert states.count(State.WAITING) == len(self._waiting), "the waiting queue differs"
        assert states.count(State.RUNNING) == len(self._running), "the running list differs"
        assert sum(state in MOVING for state in states) == self._num_transferring, "transfers are miscounted"

    def _choose(self, now: float, *, is_ahead: bool = False) -> list[Chunk]:
        self._has_made_room = False
        self.admit(now)
        chunks: list[Chunk] = []
        budget = StepBudget(self._max_step_tokens, ((s.pages.lane, s.num_left) for s in self._running))
        # Decode rows first; sorting is stable, so each kind stays oldest first.
        for sequence in sorted(self._running, key=lambda candidate: candidate.num_left > 1):
            if not budget.num_left:
                break
            if sequence.state is not State.RUNNING or sequence.group in self._paused:
                continue  # pre-empted for one before it, or nobody reads
            if is_ahead and self._ends_by_length(sequence):
                continue
            lane = sequence.pages.lane
            end = sequence.num_computed + min(sequence.num_left, budget.left(lane))
            if end == sequence.num_computed:
                continue  # what is left is other lanes'
            if is_ahead and not self._has_room(sequence, end):
                return []
            if not self._make_room(sequence, end, chunks):
                continue
            chunks.append(sequence.chunk(end))
            budget.take(lane, len(chunks[-1].token_ids))
        return chunks

    def _num_kept(self, lane: int) -> int:
        return -(-sum(sequence.pages.lane == lane for sequence in self._running) // _RESERVE_SHARE)

    def _go_on(self, sequence: Scheduled, num_have: int) -> None:
        """Have what follows the first `num_have` tokens brought or computed."""
        # Whoever has them all still lacks one that follows.
        num_missing = max(1, len(sequence.token_ids) - num_have)
        sequence.has_handoff = sequence.has_handoff and num_missing > sequence.local_below
        if sequence.has_handoff:
            sequence.state = State.TRANSFERRING
            self._num_transferring += 1
            page_ids = tuple(sequence.pages.page_ids)
            self._book.tell(PagesReady(sequence.key, page_ids, num_have, sequence.queue_s))
        else:
            sequence.num_computed = num_have
            self._run(sequence)

    def _run(self, sequence: Scheduled) -> None:
        sequence.state = State.RUNNING
        insort(self._running, sequence, key=_age)
        if not sequence.is_started:
            sequence.is_started = True
            self._book.tell(Started(sequence.key, sequence.queue_s, sequence.num_cached))

    def _ends_by_length(self, sequence: Scheduled) -> bool:
        """Return whether a token that is coming is the last one, whichever it is."""
        is_coming = sequence.token_ids[-1] == COMING
        num_output = len(sequence.output_ids) + is_coming
        return is_coming and sequence.finish.is_length(num_output, len(sequence.token_ids))

    def _has_room(self, sequence: Scheduled, end: int) -> bool:
        num_available = self.pages.num_available_in(sequence.pages.lane)
        return self.pages.pages_for(end) - len(sequence.pages.page_ids) <= num_available

    def _make_room(self, sequence: Scheduled, end: int, chunks: list[Chunk]) -> bool:
        """Get pages for `end` tokens, pre-empting younger sequences if need be; False if it lost its own.

        A sequence that already has its row in this step is not pre-empted: it is older or needed no page.
        """
        while True:
            try:
                self.pages.reserve(sequence.pages, end)
                return True
            except OverloadedError:
                self._has_made_room = True
                if self.pages.pages_for(end) > self.pages.lane_pages:
                    self._fail(sequence, self._book.too_large(end))
                    return False
                planned, lane = {chunk.key for chunk in chunks}, sequence.pages.lane
                victim = max((s for s in self._running if s.key not in planned and s.pages.lane == lane), key=_age)
                self._preempt(victim)
                if victim is sequence:
                    return False

    def _preempt(self, sequence: Scheduled) -> None:
        self._running.remove(sequence)
        self._book.give_back(sequence.key, sequence.pages)
        sequence.state, sequence.num_computed = State.WAITING, 0
        self._waiting.add(sequence)
        self._book.tell(Preempted(sequence.key))

    def _emit(self, sequence: Scheduled, tokens: Sequence[SampledToken]) -> bool:
        """Tell of the tokens up to one that ends the sequence, if there is one: what follows it never was.

        Return whether there is.
        """
        for token in tokens:
            sequence.token_ids.append(token.token_id)
            sequence.output_ids.append(token.token_id)
            finish = sequence.finish.reason(
                token.token_id, num_output_tokens=len(sequence.output_ids), num_tokens=len(sequence.token_ids)
            )
            self._book.tell(Output(sequence.key, token, finish))
            if finish:
                return True
        return False

    def _fail(self, sequence: Scheduled, error: HeadraceError) -> None:
        self._free(sequence)
        self._book.tell(Failed(sequence.key, error))

    def _free(self, sequence: Scheduled) -> None:
        """Forget a sequence and give its pages back: the only way there is, but for pre-emption, which keeps it."""
        del self._sequences[sequence.key]
        self._leave(sequence)
        self._book.give_back(sequence.key, sequence.pages)

    def _leave(self, sequence: Scheduled) -> None:
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is State.RUNNING:
            self._running.remove(sequence)
