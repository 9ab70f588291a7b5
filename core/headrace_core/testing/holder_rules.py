"""What a holder of pages is held to, by one that plays its taker. docs/wire-spec.md says each rule in full."""
# ruff: noqa: D103 - the name of a rule says it

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from typing import Any

import grpc.aio
import xxhash
from headrace.v1 import hold_service_pb2 as pb
from headrace.v1 import worker_service_pb2
from headrace.v1.hold_service_pb2_grpc import HoldServiceStub
from headrace.v1.worker_service_pb2_grpc import WorkerServiceStub

from headrace_core import beats
from headrace_core.errors import HeadraceError
from headrace_core.kv.layout import LatentAttention
from headrace_core.request import hash_tokens
from headrace_core.rpc import raised_from
from headrace_core.testing.holder_under_test import GREEDY, HolderUnderTest
from headrace_core.testing.rules import Rules, require, require_refusal
from headrace_core.transfer.values import CachedPrefix

HOLDER_RULES: Rules[HolderUnderTest] = Rules()
rule = HOLDER_RULES.rule


@rule
async def it_says_who_it_is(holder: HolderUnderTest) -> None:
    info = holder.info
    fingerprint = info.model_fingerprint
    require(bool(fingerprint) and fingerprint == fingerprint.lower(), "model_fingerprint is lower-case hexadecimal")
    require(info.incarnation != 0, "incarnation is random and not 0")
    require(info.num_pages > 0 and info.vocab_size > 1, "it has pages and a vocabulary")


@rule
async def a_sequence_is_admitted_sealed_told_and_confirmed(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    runs = await ordered.wait_all()
    first = await ordered.wait_first()
    require(ordered.kinds[0] == "admitted", f"the first event is {ordered.kinds[0]}")
    require(ordered.kinds.count("admitted") == ordered.kinds.count("last") == 1, "it is admitted and told once")
    num_pages = holder.layout.num_pages(len(holder.prompt))
    cells = [
        (run.first_layer + layer, run.first_page + page)
        for run in runs
        for layer in range(run.num_layers)
        for page in range(run.num_pages)
    ]
    every = {(layer, page) for layer in range(holder.layout.num_layers) for page in range(num_pages)}
    require(len(cells) == len(set(cells)) and set(cells) == every, "the runs are not every page of every layer, once")
    require(first.num_tokens == len(holder.prompt), f"it answers for {first.num_tokens} tokens")
    require(first.tokens_sha256 == hash_tokens(holder.prompt), "its hash is not that of what was ordered")
    require(0 <= first.token.token_id < holder.info.vocab_size, "the first token is outside the vocabulary")
    require((first.seed, first.sample_index) == (GREEDY.seed, 0), "seed and sample are not those of the order")
    await ordered.confirm()
    await asyncio.wait([ordered.reading])
    require(ordered.error is None, f"the call ends with {ordered.error}")


@rule
async def the_bytes_of_a_run_have_its_checksums(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    size = holder.layout.page_layer_bytes
    for run in await ordered.wait_all():
        data = b"".join(await holder.pull(await holder.request(ordered, run)))
        require(len(data) == size * run.num_pages * run.num_layers, f"{len(data)} bytes came of a run")
        sums = [xxhash.xxh3_64_intdigest(data[start : start + size]) for start in range(0, len(data), size)]
        require(sums == [each for layer in run.checksums for each in layer], "checksums differ")


@rule
async def slots_past_the_last_token_are_zero(holder: HolderUnderTest) -> None:
    ordered, layout = holder.order(), holder.layout
    num_used = len(holder.prompt) % layout.page_size
    if not num_used:
        return
    last = max(await ordered.wait_all(), key=lambda run: run.first_page)
    page = last.first_page + last.num_pages - 1
    request = await holder.request(ordered, last, first_layer=0, num_layers=1, first_page=page, num_pages=1)
    data = b"".join(await holder.pull(request))
    num_planes = 1 if isinstance(layout.attention, LatentAttention) else 2
    plane = len(data) // num_planes
    for start in range(0, len(data), plane):
        unused = data[start + plane * num_used // layout.page_size : start + plane]
        require(not any(unused), "a slot past the last token is not zero")


@rule
async def a_part_of_a_run_can_be_pulled(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    run = (await ordered.wait_all())[-1]
    layer, page = run.num_layers - 1, run.num_pages - 1
    part = {
        "first_layer": run.first_layer + layer,
        "num_layers": 1,
        "first_page": run.first_page + page,
        "num_pages": 1,
    }
    data = b"".join(await holder.pull(await holder.request(ordered, run, **part)))
    require(xxhash.xxh3_64_intdigest(data) == run.checksums[layer][page], "the checksum of a page alone differs")


@rule
async def no_frame_is_longer_than_offered(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    (run, *_), admission = await ordered.wait_all(), await ordered.wait_admitted()
    offers = [offer.grpc.frame_bytes for offer in admission.shards[0].offers if offer.HasField("grpc")]
    require(bool(offers) and offers[0] > 0, "it offers no transport grpc")
    frames = await holder.pull(await holder.request(ordered, run))
    require(all(len(frame) <= offers[0] for frame in frames), f"a frame is longer than {offers[0]} bytes")


@rule
async def what_the_taker_has_is_not_sealed(holder: HolderUnderTest) -> None:
    size = holder.layout.page_size
    ordered = holder.order(num_have_tokens=size)
    runs = await ordered.wait_all()
    require(min(run.first_page for run in runs) == 1, "a page is sealed that the taker has")
    await ordered.confirm()


@rule
async def what_the_taker_has_are_pages_of_the_sequence(holder: HolderUnderTest) -> None:
    size = holder.layout.page_size
    past = holder.layout.num_pages(len(holder.prompt) + 1) * size
    for wrong in (past, *([1] if size > 1 else [])):
        await holder.refused(lambda it, wrong=wrong: setattr(it, "num_have_tokens", wrong), "BAD_HANDOFF")


@rule
async def another_model_is_refused(holder: HolderUnderTest) -> None:
    await holder.refused(lambda it: setattr(it, "model_fingerprint", "beef"), "MODEL_MISMATCH")


@rule
async def another_layout_is_refused(holder: HolderUnderTest) -> None:
    await holder.refused(lambda it: setattr(it.layout, "page_size", it.layout.page_size + 1), "LAYOUT_MISMATCH")


@rule
async def a_hash_that_is_not_that_of_the_tokens_is_refused(holder: HolderUnderTest) -> None:
    await holder.refused(lambda it: setattr(it, "tokens_sha256", bytes(32)), "TOKENS_MISMATCH")


@rule
async def an_order_names_its_router(holder: HolderUnderTest) -> None:
    await holder.refused(lambda it: it.ClearField("router_id"), "BAD_REQUEST")


@rule
async def an_order_says_how_long_it_has(holder: HolderUnderTest) -> None:
    await holder.refused(lambda it: it.ClearField("timeout_ms"), "BAD_REQUEST")


@rule
async def attempts_count_from_1(holder: HolderUnderTest) -> None:
    await holder.refused(lambda it: it.ClearField("attempt"), "BAD_REQUEST")


@rule
async def a_seed_must_be_set(holder: HolderUnderTest) -> None:
    await holder.refused(lambda it: it.sampling.ClearField("seed"), "BAD_SAMPLING")


@rule
async def an_empty_prompt_is_refused(holder: HolderUnderTest) -> None:
    def empty(message: pb.Open) -> None:
        message.ClearField("token_ids")
        message.num_prompt_tokens, message.tokens_sha256 = 0, hash_tokens([])

    await holder.refused(empty, "EMPTY_PROMPT")


@rule
async def a_token_outside_the_vocabulary_is_refused(holder: HolderUnderTest) -> None:
    def outside(message: pb.Open) -> None:
        message.token_ids[0] = holder.info.vocab_size
        message.tokens_sha256 = hash_tokens(list(message.token_ids))

    await holder.refused(outside, "BAD_TOKEN")


@rule
async def pages_are_shown_to_who_has_the_key_alone(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    (run, *_) = await ordered.wait_all()
    await holder.pull_refused(await holder.request(ordered, run, lease_key="0" * 32), "LEASE_ENDED")


@rule
async def a_read_names_the_process(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    (run, *_) = await ordered.wait_all()
    other = holder.info.incarnation ^ 1
    await holder.pull_refused(await holder.request(ordered, run, incarnation=other), "WORKER_RESTARTED")


@rule
async def a_read_says_what_it_takes_the_pages_for(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    (run, *_) = await ordered.wait_all()
    await holder.pull_refused(await holder.request(ordered, run, tokens_sha256=bytes(32)), "TOKENS_MISMATCH")


@rule
async def what_is_not_sealed_is_not_shown(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    (run, *_) = await ordered.wait_all()
    past = {"first_page": holder.layout.num_pages(len(holder.prompt)), "num_pages": 1}
    for wrong in (past, {"num_pages": 0}, {"num_layers": holder.layout.num_layers + 1}):
        await holder.pull_refused(await holder.request(ordered, run, **wrong), "BAD_HANDOFF")


@rule
async def a_confirmed_lease_is_over(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    (run, *_) = await ordered.wait_all()
    await ordered.confirm()
    await holder.pull_refused(await holder.request(ordered, run), "LEASE_ENDED")


@rule
async def a_taker_that_leaves_ends_its_lease(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    (run, *_) = await ordered.wait_all()
    request = await holder.request(ordered, run)
    await ordered.cancel()
    while True:  # the holder hears it in a moment
        try:
            await holder.pull(request)
        except HeadraceError as error:
            require_refusal(error, "ABORTED", "LEASE_ENDED")
            return


@rule
async def a_higher_attempt_takes_the_place_of_a_lower_one(holder: HolderUnderTest) -> None:
    first = holder.order("attempts")
    await first.wait_admitted()
    second = holder.order("attempts", attempt=2)
    require_refusal(await first.refused(), "ABORTED", "STALE_ATTEMPT")
    await second.wait_admitted()
    late = holder.order("attempts")
    require_refusal(await late.refused(), "ABORTED", "STALE_ATTEMPT")
    require(second.error is None, "a lower attempt ended a higher one")


@rule
async def lease_keys_are_not_used_twice(holder: HolderUnderTest) -> None:
    keys = [(await holder.order().wait_admitted()).lease_key for _ in range(3)]
    require(len(set(keys)) == len(keys), "two leases have one key")
    require(all(len(key) >= 16 for key in keys), "a key is so short that it can be guessed")


@rule
async def a_call_begins_with_an_order(holder: HolderUnderTest) -> None:
    await _raw_refused(holder, pb.HoldRequest(confirm=pb.Confirm()))


@rule
async def a_call_is_for_one_sequence(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    await ordered.wait_admitted()
    ordered.say(pb.HoldRequest(open=pb.Open()))
    require_refusal(await ordered.refused(), "INVALID_ARGUMENT", "BAD_REQUEST")


@rule
async def a_first_token_may_be_the_last(holder: HolderUnderTest) -> None:
    ordered = holder.order(params=dataclasses.replace(GREEDY, max_tokens=1))
    first = await ordered.wait_first()
    require(first.finish is not None and first.finish.name == "LENGTH", f"it ends with {first.finish}")


@rule
async def what_a_prefill_worker_has_cached_is_not_given_away(holder: HolderUnderTest) -> None:
    await holder.refused(lambda it: setattr(it, "holder_incarnation", holder.info.incarnation), "BAD_REQUEST")


@rule
async def a_cached_prefix_that_is_not_to_be_had_is_computed(holder: HolderUnderTest) -> None:
    unheard = [1 + secrets.randbelow(holder.info.vocab_size - 1) for _ in holder.prompt]
    nobody = CachedPrefix("127.0.0.1:9", 1, 2 * holder.layout.page_size)
    first = await holder.order(token_ids=unheard, cached=nobody).wait_first()
    require(first.tokens_sha256 == hash_tokens(unheard), "its hash is not that of what was ordered")


@rule
async def nothing_is_held_past_its_time(holder: HolderUnderTest) -> None:
    def soon(message: pb.Open) -> None:
        message.timeout_ms = 500

    ordered = holder.order(change=soon)
    require_refusal(await ordered.refused(), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")


@rule
async def it_beats_while_it_has_nothing_to_say(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    await ordered.wait_all()
    await asyncio.sleep(3 * beats.BEAT_S)
    require(ordered.num_beats > 0, "three seconds of silence")


@rule
async def a_taker_that_falls_silent_ends_its_lease(holder: HolderUnderTest) -> None:
    ordered = holder.order()
    await ordered.wait_all()
    ordered.fall_silent()
    require_refusal(await ordered.refused(), "ABORTED", "TAKER_LOST")


@rule
async def every_page_is_free_at_the_end(holder: HolderUnderTest) -> None:
    await holder.order().wait_all()
    await holder.taker.leave()
    stub: Any = WorkerServiceStub(holder.channel)
    async for load in stub.WatchLoad(worker_service_pb2.WatchLoadRequest()):
        if load.num_free_pages == holder.info.num_pages and not load.num_leases:
            return


async def _raw_refused(holder: HolderUnderTest, *messages: pb.HoldRequest) -> None:
    stub: Any = HoldServiceStub(holder.channel)
    call = stub.Hold(iter(messages))
    refusal: HeadraceError | None = None
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        refusal = raised_from(error)
    require_refusal(refusal, "INVALID_ARGUMENT", "BAD_REQUEST")
