"""What a taker is held to, by one that plays its router and its holder. docs/wire-spec.md says each rule in full."""
# ruff: noqa: D103 - the name of a rule says it

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from headrace.v1 import decode_service_pb2
from headrace.v1 import hold_service_pb2 as pb
from headrace.v1.worker_service_pb2 import GetInfoResponse

from headrace_core.errors import HeadraceError, UnavailableError
from headrace_core.request import SamplingParams, hash_tokens
from headrace_core.testing.async_test import eventually
from headrace_core.testing.mini_holder import FIRST_TOKEN, MiniHolder, Rewrite
from headrace_core.testing.mini_router import Collected, MiniRouter
from headrace_core.testing.rules import EXPECTED, Rules, require, require_refusal

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=3, ignore_eos=True)
DECODE, PREFILL, CHANNEL = (
    decode_service_pb2.FAILURE_SIDE_DECODE,
    decode_service_pb2.FAILURE_SIDE_PREFILL,
    decode_service_pb2.FAILURE_SIDE_CHANNEL,
)


class TakerUnderTest:
    """A taker, and the router and holder that speak to it."""

    def __init__(self, address: str, info: GetInfoResponse, router: MiniRouter, holder: MiniHolder) -> None:
        self.address = address
        self.incarnation = info.incarnation
        self.router = router
        self.holder = holder
        self.vocab_size = info.vocab_size
        page_size = info.layout.page_size
        self._num_prompt = 2 * page_size + max(1, page_size // 2)
        self.prompt = self._new_prompt()
        self._num_orders = 0

    def start(self, *, is_known: bool = False, **more: Any) -> Collected:
        """Start a sequence that nobody started before; `is_known`: of the last one's tokens. See `MiniRouter.start`."""
        self._num_orders += 1
        self.prompt = self.prompt if is_known else self._new_prompt()
        return self.router.start(f"order-{self._num_orders}", self.prompt, params=GREEDY, **more)

    def _new_prompt(self) -> list[int]:
        """Return one that no order had, so that the worker's prefix cache has no page of it."""
        return [1 + secrets.randbelow(self.vocab_size - 1) for _ in range(self._num_prompt)]

    async def fails(self, reason: str, side: int, *, is_known: bool = False) -> None:
        """Require that a sequence, with what was made wrong at its holder, fails with `reason`, the fault of `side`."""
        try:
            collected = self.start(is_known=is_known)
            require_refusal(await collected.wait_failure(), EXPECTED[reason], reason)
            require(collected.side == side, f"the fault is said to be {_side(collected.side)}'s, not {_side(side)}'s")
            require(collected.joined is None, "it joined before it failed")
        finally:
            self.holder.reset()


TAKER_RULES: Rules[TakerUnderTest] = Rules()
rule = TAKER_RULES.rule


def _side(side: int) -> str:
    return decode_service_pb2.FailureSide.Name(decode_service_pb2.FailureSide.ValueType(side))


def _changing(kind: str, change: Callable[[Any], None]) -> Rewrite:
    def rewrite(event: pb.HoldResponse) -> list[pb.HoldResponse]:
        if event.WhichOneof("event") == kind:
            change(getattr(event, kind))
        return [event]

    return rewrite


def _twice(kind: str) -> Rewrite:
    return lambda event: [event, event] if event.WhichOneof("event") == kind else [event]


def _without(kind: str) -> Rewrite:
    return lambda event: [] if event.WhichOneof("event") == kind else [event]


def _swap_checksum(run: Any) -> None:
    run.checksums[0].page_xxh3[0] ^= 1


def _other_count(last: Any) -> None:
    last.num_tokens -= 1
    last.sampling_state.position -= 1


@rule
async def a_hand_off_is_taken_and_goes_on(taker: TakerUnderTest) -> None:
    num_before = taker.holder.num_confirmed
    collected = taker.start()
    tokens = await collected.tokens()
    require(tokens[0] == FIRST_TOKEN, f"the first token is told as {tokens[0]}")
    require(len(tokens) == GREEDY.max_tokens, f"{len(tokens)} tokens of {GREEDY.max_tokens} were told")
    require(collected.joined is not None and collected.joined.transport == "grpc", "it joined without a transfer")
    require(taker.holder.num_confirmed == num_before + 1, "it used the pages without the holder's last look")
    order = taker.holder.orders[-1]
    require(order.spec.token_ids == taker.prompt, "it ordered other tokens")
    require(order.tokens_sha256 == hash_tokens(taker.prompt), "its hash is not that of the tokens")


@rule
async def a_session_with_another_process_is_refused(taker: TakerUnderTest) -> None:
    async with MiniRouter(decode=taker.address, worker_incarnation=taker.incarnation):
        pass
    error: HeadraceError | None = None
    try:
        async with MiniRouter(decode=taker.address, worker_incarnation=taker.incarnation ^ 1):
            pass
    except HeadraceError as refusal:
        error = refusal
    require_refusal(error, EXPECTED["WORKER_RESTARTED"], "WORKER_RESTARTED")


@rule
async def what_it_says_it_has_it_has(taker: TakerUnderTest) -> None:
    """That it has anything is no rule: what it orders of tokens that it took before is what must come."""
    expected = await taker.start().tokens()
    collected = taker.start(is_known=True)
    require(await collected.tokens() == expected, "the same tokens, some of them at hand, give other ones")
    order, layout = taker.holder.orders[-1], taker.holder.layout
    require(order.num_have_tokens < len(taker.prompt), "it says to have a page that is not full")
    num_pages = layout.num_pages(len(taker.prompt)) - order.num_have_pages
    require(collected.joined is not None and collected.joined.num_transfer_pages == num_pages, "other pages came")


@rule
async def a_page_that_it_has_does_not_come_again(taker: TakerUnderTest) -> None:
    await taker.start().tokens()
    await taker.start(is_known=True).tokens()
    if taker.holder.orders[-1].num_have_tokens:
        taker.holder.rewrite = _changing("run", lambda it: setattr(it, "first_page", it.first_page - 1))
        await taker.fails("PROTOCOL", PREFILL, is_known=True)


WRONG: dict[str, tuple[Rewrite, str, int]] = {
    "another model is refused": (
        _changing("admitted", lambda it: setattr(it, "model_fingerprint", "beef")), "MODEL_MISMATCH", CHANNEL),
    "another layout is refused": (
        _changing("admitted", lambda it: setattr(it.layout, "page_size", it.layout.page_size + 1)),
        "LAYOUT_MISMATCH", CHANNEL),
    "an admission names a lease": (
        _changing("admitted", lambda it: it.ClearField("lease_key")), "PROTOCOL", PREFILL),
    "an admission names a shard": (_changing("admitted", lambda it: it.ClearField("shards")), "PROTOCOL", PREFILL),
    "no transport in common is refused": (
        _changing("admitted", lambda it: it.shards[0].ClearField("transports")), "NO_COMMON_TRANSPORT", CHANNEL),
    "a lease that is not held is lost": (
        _changing("admitted", lambda it: setattr(it, "lease_key", "0" * 32)), "LEASE_ENDED", PREFILL),
    "another process is refused": (
        _changing("admitted", lambda it: setattr(it.shards[0], "incarnation", 1)), "WORKER_RESTARTED", PREFILL),
    "a sequence is admitted once": (_twice("admitted"), "PROTOCOL", PREFILL),
    "nothing comes before admission": (_without("admitted"), "PROTOCOL", PREFILL),
    "a page is sealed once": (_twice("run"), "PROTOCOL", PREFILL),
    "a run stays inside its sequence": (
        _changing("run", lambda it: setattr(it, "first_page", 1)), "PROTOCOL", PREFILL),
    "a run has checksums for all its pages": (_changing("run", lambda it: it.pages.pop()), "PROTOCOL", PREFILL),
    "a first token comes once": (_twice("last"), "PROTOCOL", PREFILL),
    "other tokens are refused": (
        _changing("last", lambda it: setattr(it, "tokens_sha256", bytes(32))), "TOKENS_MISMATCH", CHANNEL),
    "another number of tokens is refused": (_changing("last", _other_count), "BAD_HANDOFF", PREFILL),
    "another seed is refused": (
        _changing("last", lambda it: setattr(it.sampling_state, "seed", 5)), "BAD_HANDOFF", PREFILL),
    "nothing is confirmed unasked": (
        lambda event: [pb.HoldResponse(confirmed=pb.Confirmed()), event], "PROTOCOL", PREFILL),
    "other checksums are refused": (_changing("run", _swap_checksum), "CHECKSUM", CHANNEL),
}  # fmt: skip


def _register(name: str, rewrite: Rewrite, reason: str, side: int) -> None:
    async def check(taker: TakerUnderTest) -> None:
        taker.holder.rewrite = rewrite
        await taker.fails(reason, side)

    check.__name__ = name
    rule(check)


for _name, (_rewrite, _reason, _whose) in WRONG.items():
    _register(_name, _rewrite, _reason, _whose)


@rule
async def a_token_outside_the_vocabulary_is_refused(taker: TakerUnderTest) -> None:
    taker.holder.rewrite = _changing("last", lambda it: setattr(it, "token_id", taker.vocab_size))
    await taker.fails("PROTOCOL", PREFILL)


@rule
async def bytes_that_changed_on_their_way_are_refused(taker: TakerUnderTest) -> None:
    def flip() -> None:
        taker.holder.memory.page_bytes(0, 0)[0] ^= 0xFF

    taker.holder.on_sealed = flip
    await taker.fails("CHECKSUM", CHANNEL)


@rule
async def a_page_that_was_reused_is_refused(taker: TakerUnderTest) -> None:
    def reuse() -> None:
        taker.holder.generation += 1

    taker.holder.on_sealed = reuse
    await taker.fails("STALE_PAGE", PREFILL)


@rule
async def the_reason_of_a_holder_is_passed_on(taker: TakerUnderTest) -> None:
    taker.holder.error = UnavailableError("DRAINING", "made to go away")
    try:
        collected = taker.start()
        require_refusal(await collected.wait_failure(), "UNAVAILABLE", "DRAINING")
        require(collected.side == PREFILL, f"the fault is said to be {_side(collected.side)}'s")
    finally:
        taker.holder.reset()


@rule
async def a_holder_that_falls_silent_is_lost(taker: TakerUnderTest) -> None:
    taker.holder.is_silent, taker.holder.rewrite = True, _without("last")
    await taker.fails("HOLDER_LOST", PREFILL)


@rule
async def a_cancelled_sequence_ends_its_call(taker: TakerUnderTest) -> None:
    num_before = len(taker.holder.orders)
    taker.holder.rewrite = _without("last")
    try:
        collected = taker.start()
        await eventually(lambda: len(taker.holder.orders) > num_before, "it is ordered")
        taker.router.cancel(collected)
        await taker.holder.wait_free()
    finally:
        taker.holder.reset()


@rule
async def a_sequence_ends_when_its_time_is_up(taker: TakerUnderTest) -> None:
    taker.holder.rewrite = _without("last")
    try:
        collected = taker.start(timeout_s=0.5)
        require_refusal(await collected.wait_failure(), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        await taker.holder.wait_free()
    finally:
        taker.holder.reset()


@rule
async def a_higher_attempt_takes_the_place_of_a_lower_one(taker: TakerUnderTest) -> None:
    taker.holder.rewrite = _without("last")
    try:
        first = taker.router.start("attempts", taker.prompt, params=GREEDY)
        second = taker.router.start("attempts", taker.prompt, params=GREEDY, attempt=2)
        require_refusal(await first.wait_failure(), "ABORTED", "STALE_ATTEMPT")
        late = taker.router.start("attempts", taker.prompt, params=GREEDY)
        require_refusal(await late.wait_failure(), "ABORTED", "STALE_ATTEMPT")
        require(not second.is_over, "a lower attempt ended a higher one")
        taker.router.cancel(second)
        await taker.holder.wait_free()
    finally:
        taker.holder.reset()
