"""One sample of one request: its state (`sample_state.py`), its tokens, its text, and what its client has not got yet.

An entry of the decode worker is taken if it is at the position where the sample is: what is behind is known already,
what is ahead would leave a gap.

Tokens are appended once, whoever computed them; a new attempt prefills the prompt and all of them. So the client sees
every token once, and, as randomness depends on the position alone, the same ones as without the failure.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from headrace.v1 import decode_service_pb2, types_pb2
from headrace_core.errors import HeadraceError, ProtocolError
from headrace_core.request import FinishReason
from headrace_core.wire import decode_failure, decode_finish

from headrace_router.fleet.answers import check_tokens_computed
from headrace_router.fleet.session import Ended, LastTransfer, Progress, Side, TakePlainly, Whose
from headrace_router.fleet.worker import Worker
from headrace_router.metrics import TokenMetrics, TracedTokens
from headrace_router.placement.capacity import Waiting
from headrace_router.placement.fair_queue import Client, Turn
from headrace_router.placement.policy import EXPECTED_OUTPUT_TOKENS
from headrace_router.placement.prefix import Prefix
from headrace_router.requests.admission import RequestSpec
from headrace_router.requests.cached import Cached, Kept, cached_at
from headrace_router.requests.ending import ending_of
from headrace_router.requests.piece import Ending, Piece
from headrace_router.requests.prompt_scores import PromptScores
from headrace_router.requests.sample_state import EDGES, SampleState
from headrace_router.requests.unsent import Unsent
from headrace_router.text.assembler import Assembler
from headrace_router.text.detokenizer import Detokenizer
from headrace_router.timings import Waterfall

_WHOSE = {
    decode_service_pb2.FAILURE_SIDE_DECODE: Whose.DECODE,
    decode_service_pb2.FAILURE_SIDE_PREFILL: Whose.PREFILL,
    decode_service_pb2.FAILURE_SIDE_CHANNEL: Whose.CHANNEL,
}


OnText = Callable[[int, str, int], bool]
"""Takes a sample's index, new text and how many tokens that is; returns False if it can't tell the client now."""

_NO_TARGET_S = 60.0
"""A request without a target for its first token is as urgent as one with this target, so that it starts one day."""


class Sample:
    """The mutable object of one sample. A `StepSink` while a decode worker runs it. Event loop only."""

    def __init__(
        self,
        spec: RequestSpec,
        sample_index: int,
        detokenizer: Detokenizer,
        *,
        client: Client,
        prefix: Prefix,
        tokens: TokenMetrics | TracedTokens,
        on_news: Callable[[Sample], None],
        on_cached: Callable[[Cached], None] | None,
    ) -> None:
        """Args: `on_cached` hears where prompt pages can be found as soon as they can, once an attempt or twice."""
        self.spec = spec
        self.sample_index = sample_index
        self.number = 0
        """Names it at the workers, in every attempt."""
        self._state = SampleState.QUEUED
        self.attempt = 0
        self.avoid: frozenset[str] = frozenset()
        self.reserves_all = False
        """True once it ran out of pages: the next attempt reserves those of all that it may still produce."""
        self.prefer = ""
        """See `Waiting.prefer`."""
        self.cached: Cached | None = None
        """Where the first of its tokens can be found, if that is known."""
        self.kept: Kept | None = None
        """Who keeps its pages until it runs elsewhere."""
        self.num_moves = 0
        """Attempts that ended because their worker went away, and it was placed elsewhere."""
        self.output_ids: list[int] = []
        cost = len(spec.prompt_ids) + min(spec.params.max_tokens or 0, EXPECTED_OUTPUT_TOKENS)
        due_s = spec.arrival_s + min(spec.targets.ttft_s, _NO_TARGET_S)
        self.turn = Turn(client, (spec.priority, due_s, spec.arrival_s, sample_index), cost)
        """Its standing in the queue, for all attempts."""
        self.finish_reason: FinishReason | None = None
        self.waterfall = Waterfall(spec.arrival_s)
        self.waterfall.mark("tokenize", spec.tokenized_s)
        self.first_token_s: float | None = None
        self.last_token_s = 0.0
        self.num_cached_tokens = 0
        self.transfer_bytes = self.num_transfer_pages = self.hidden_transfer_bytes = 0
        self.transport = self.prefill_address = self.decode_address = ""
        self._decode: Worker | None = None
        self.is_closed = False
        """True when the client's last message was taken."""
        self.attempt_over: asyncio.Future[Ended] | None = None
        """Resolved when nothing more comes from the decode worker for this attempt."""
        self._prefix = prefix
        self._tokens = tokens
        self._on_news = on_news
        self._on_cached = on_cached
        self._assembler = Assembler(
            detokenizer,
            spec.params.stop_strings,
            min_tokens=spec.params.min_tokens,
            special_stops=spec.special_stops,
        )
        self._progress: Progress | None = None
        self._is_first_step = False
        self.on_text: OnText | None = None
        """Tells the client of plain tokens at once, if it can."""
        self.take_plainly: TakePlainly | None = None
        """`_take_plainly`, while that may do. See `session.StepSink`."""
        self.has_logprobs = spec.params.top_logprobs is not None
        self.unsent = Unsent(sample_index, self.output_ids)
        self.prompt_scores = PromptScores(spec, self.unsent)
        self._num_prompt = len(spec.prompt_ids)
        self._most_output = spec.params.max_tokens or 0

    @property
    def state(self) -> SampleState:
        """Where it is."""
        return self._state

    def move(self, to: SampleState) -> None:
        """Go on to another state."""
        assert to in EDGES[self._state], f"{self._state.value} is not followed by {to.value}"
        self._state = to
        self.take_plainly = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.spec.prompt_ids) + len(self.output_ids)

    @property
    def is_over(self) -> bool:
        """True in a terminal state."""
        return self.state in (SampleState.FINISHED, SampleState.FAILED)

    @property
    def due_s(self) -> float:
        """When its first token is to come, as long as it can still be refused for that; infinite: at no time."""
        is_judged = not self.attempt and not self.sample_index  # of n samples the first says whether there is time
        return self.spec.arrival_s + self.spec.targets.ttft_s if is_judged else math.inf

    @property
    def matched_stop_string(self) -> str:
        """The stop string that ended it; empty if none did."""
        return self._assembler.matched

    def waiting(self) -> Waiting:
        """Return what policies need to know."""
        left = (self.spec.params.max_tokens or 0) - len(self.output_ids)
        expected = left if self.reserves_all else min(left, EXPECTED_OUTPUT_TOKENS)
        cached = None if self.cached is None or self.cached.is_lost else self.cached
        return Waiting(
            num_tokens=self.num_tokens,
            num_expected_tokens=self.num_tokens + expected,
            prefix_key=self._prefix.key,
            avoid=self.avoid,
            prefer=self.prefer,
            prefer_decode=cached.worker.address if cached else "",
            num_cached_tokens=cached.num_tokens if cached else 0,
            num_most_tokens=self.num_tokens + left,
            has_output=bool(self.output_ids),
            client=self.turn.client,
            most_step_s=self.spec.targets.itl_s,
            prefix=self._prefix,
        )

    def begin_attempt(self, progress: Progress, *, prefill_address: str, decode: Worker, now_s: float) -> None:
        """Leave the queue."""
        self.attempt += 1
        self.prefill_address, self.decode_address, self._decode = prefill_address, decode.address, decode
        self.move(SampleState.PREFILLING if prefill_address else SampleState.JOINING)
        self.attempt_over = asyncio.get_running_loop().create_future()
        self._progress = progress
        self._is_first_step = False
        self.waterfall.mark("queue", now_s)
        if self._on_cached is not None and not cached_at(decode, len(self.spec.prompt_ids)).num_tokens:
            self._tell_cached()  # there will be none

    def on_entry(self, entry: decode_service_pb2.StepEntry, event: str, now_s: float) -> bool:
        """Take what happened at the decode worker. See `session.StepSink`."""
        if self.is_over:
            return False
        if event == "failure":
            failure = entry.failure
            self.on_ended(Ended(Side.WORKER, decode_failure(failure), _WHOSE[failure.side]))
            return True
        if event == "prompt_logprobs":
            return self.prompt_scores.take(entry.prompt_logprobs) and (self._on_news(self) is None)
        if entry.position != self.num_tokens:
            if entry.position > self.num_tokens:
                raise ProtocolError(
                    "PROTOCOL", f"it sent {event} at {entry.position}, {self.num_tokens} tokens are known"
                )
            return False
        if event == "tokens":
            self._on_tokens(entry.tokens, now_s)
        elif event == "prefilled":
            self._on_prefilled(entry.prefilled, now_s)
        else:
            self._on_joined(entry.joined, now_s)
        return True

    def on_ended(self, ended: Ended) -> None:
        """The attempt is over at the decode worker. See `session.StepSink`."""
        if self.attempt_over is not None and not self.attempt_over.done():
            self.attempt_over.set_result(ended)

    def on_prefill_lost(self, error: HeadraceError) -> None:
        """The worker that computes its prompt is lost to the router, if not to the decode worker."""
        if self.state is SampleState.PREFILLING:
            self.on_ended(Ended(Side.ROUTER, error, Whose.PREFILL))

    def let_go(self) -> None:
        """Let nobody keep its pages any more. Idempotent."""
        kept, self.kept = self.kept, None
        if kept is not None:
            kept.let_go()

    def mark_failure(self, now_s: float) -> None:
        """Account for the time of an attempt that failed, or was moved."""
        if self.state is SampleState.DECODING and not self._is_first_step:
            self.waterfall.mark("decode", self.last_token_s)
        self.waterfall.mark("retry", now_s)

    def finish(self, reason: FinishReason) -> None:
        """Enter FINISHED; the client's last message is due."""
        if self.state is SampleState.DECODING:
            self.waterfall.mark("decode", self.last_token_s)
        self.unsent.text += self._assembler.finish()
        self.finish_reason = FinishReason.STOP if self._assembler.matched else reason
        self.move(SampleState.FINISHED)
        self._on_news(self)

    def take(self) -> Piece:
        """Return what the client has not been sent yet, as much as a message may hold; it counts as sent."""
        return self.unsent.take(self._close if self.finish_reason is not None else None)

    def _on_prefilled(self, prefilled: decode_service_pb2.Prefilled, now_s: float) -> None:
        """Take the prefill worker's token, and the time it took."""
        self._require(SampleState.PREFILLING, "a first token")
        check_tokens_computed(prefilled, self.spec.encoded_prompt.sha256(self.output_ids))
        finish = decode_finish(prefilled.finish_reason)
        logprobs = [prefilled.logprobs] if prefilled.HasField("logprobs") and self.has_logprobs else ()
        self._check(1, len(logprobs), finish)
        parts = (
            ("decode_queue", prefilled.decode_queue_us),
            ("prefill_queue", prefilled.prefill_queue_us),
            ("prefill", prefilled.prefill_us),
        )
        self.waterfall.split(parts, "prefill_hop", now_s)
        self.waterfall.mark_first_token()
        self.num_cached_tokens = prefilled.num_cached_tokens
        self.move(SampleState.JOINING)
        assert self._progress is not None, "an attempt runs"
        self._progress.on_prefilled(self._num_computed())
        self._append([prefilled.token_id], logprobs, finish, now_s)

    def _on_joined(self, joined: decode_service_pb2.Joined, now_s: float) -> None:
        """Take note that it runs at the decode worker, and of what it took."""
        if self.state is SampleState.PREFILLING:
            self.prefill_address = ""  # it was not asked
        else:
            self._require(SampleState.JOINING, "that it joined")
        is_handed_off = bool(self.prefill_address)
        self.transfer_bytes += joined.transfer_bytes
        self.num_transfer_pages += joined.num_transfer_pages
        self.hidden_transfer_bytes += joined.hidden_transfer_bytes
        self.waterfall.hide(joined.hidden_transfer_us)
        self.transport = joined.transport or self.transport
        parts = [] if is_handed_off else [("decode_queue", joined.queue_us)]
        if is_handed_off or joined.num_transfer_pages:
            parts.append(("transfer", joined.transfer_us))
        self.waterfall.split(parts, "join", now_s)
        if not is_handed_off and self.kept is None:
            self.num_cached_tokens = joined.num_cached_tokens
        self.move(SampleState.DECODING)
        self._is_first_step = True
        assert self._progress is not None, "an attempt runs"
        self._progress.on_joined(LastTransfer.of(joined))
        self.let_go()
        if is_handed_off:
            self._tell_cached()

    def _on_tokens(self, tokens: decode_service_pb2.Tokens, now_s: float) -> None:
        self._require(SampleState.DECODING, "tokens")
        finish = decode_finish(tokens.finish_reason) if tokens.finish_reason else None
        token_ids, logprobs = tokens.token_ids, tokens.logprobs if self.has_logprobs else ()
        self._check(len(token_ids), len(logprobs), finish)
        if self._is_first_step:
            self._is_first_step = False
            self._tell_cached()
            self.waterfall.mark("first_step", now_s)
            self.waterfall.mark_first_token()
            assert self._progress is not None, "an attempt runs"
            self._progress.on_stepped(self._num_computed())
        self._append(token_ids, logprobs, finish, now_s)
        if self.state is SampleState.DECODING and not self.has_logprobs:
            self.take_plainly = self._take_plainly if self._assembler.plain_push is not None else None

    def _take_plainly(self, entry: decode_service_pb2.StepEntry, vocab_size: int, now_s: float) -> bool:
        """Take a step's token as `on_entry` does, if nothing but its text comes of it; return whether so.

        Nearly every token of all comes this way, and what it costs is what the router costs: each attribute of a
        message is read once, and what can't be is looked for in the long way.
        """
        tokens = entry.tokens
        token_ids, output_ids = tokens.token_ids, self.output_ids
        num_output = len(output_ids)
        if (
            len(token_ids) != 1
            or tokens.finish_reason
            or entry.position != self._num_prompt + num_output
            or num_output + 1 >= self._most_output
            or (token_id := token_ids[0]) >= vocab_size
            or (push := self._assembler.plain_push) is None
        ):
            return False
        unsent, on_text = self.unsent, self.on_text
        has_told_all = on_text is not None and unsent.is_empty
        output_ids.append(token_id)
        text = push(token_id)
        self._tokens.more(now_s - self.last_token_s, 1)
        self.last_token_s = now_s
        if has_told_all and on_text is not None and on_text(self.sample_index, text, 1):
            unsent.skip()
        else:
            unsent.text += text
            self._on_news(self)
        return True

    def _num_computed(self) -> int:
        return max(0, self.num_tokens - self.num_cached_tokens)

    def _tell_cached(self) -> None:
        assert self._decode is not None, "an attempt runs"
        if self._on_cached is not None:
            self._on_cached(cached_at(self._decode, len(self.spec.prompt_ids)))

    def _append(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[types_pb2.TokenLogprobs],
        finish: FinishReason | None,
        now_s: float,
    ) -> None:
        """Take new, checked tokens; with `finish`, or when a stop string is complete, the sample ends, and its run."""
        by = Side.WORKER if finish else Side.ROUTER  # of a stop string the worker knows nothing
        if self.spec.is_prompt_only:
            token_ids, logprobs, self.last_token_s = (), (), now_s
        num_new = 0
        for token_id in token_ids:
            num_new += 1
            self.output_ids.append(token_id)
            self.unsent.text += self._assembler.push(token_id)
            if self._assembler.matched:
                finish = FinishReason.STOP
                break
        if logprobs:
            self.unsent.add_logprobs(logprobs[:num_new])
        if num_new:
            self._count(num_new, now_s)
        if finish is None:
            self._on_news(self)
        else:
            self.finish(finish)
            self.on_ended(Ended(by))

    def _require(self, state: SampleState, what: str) -> None:
        if self.state is not state:
            raise ProtocolError("PROTOCOL", f"it sent {what} while the sequence was {self.state.value}")

    def _check(self, num_new: int, num_logprobs: int, finish: FinishReason | None) -> None:
        """Check that so many new tokens can be this sample's.

        Raises:
            ProtocolError: PROTOCOL.
        """
        if not self.prompt_scores.is_whole:
            raise ProtocolError("PROTOCOL", "it sent a token before the log-probabilities of the prompt")
        if self.has_logprobs and num_logprobs != num_new:
            raise ProtocolError("PROTOCOL", f"it sent {num_logprobs} log-probabilities for {num_new} tokens")
        most, num_output = self.spec.params.max_tokens or 0, len(self.output_ids) + num_new
        # The last one too must say that it is the last: without room for one more, no attempt could follow.
        if num_output > most or (num_output == most and finish is None):
            raise ProtocolError("PROTOCOL", f"it sent {num_output} tokens of {most} and no end")

    def _count(self, num_new: int, now_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now_s
            self._tokens.first(now_s - self.spec.arrival_s, num_new)
        else:
            self._tokens.more(now_s - self.last_token_s, num_new)
        self.last_token_s = now_s

    def _close(self) -> Ending:
        self.is_closed = True
        return ending_of(self)
