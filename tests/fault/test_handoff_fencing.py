"""What is not for this model, layout, sequence, attempt, page or process is refused, and costs no page."""

import asyncio
from typing import Any, Literal

import pytest
from headrace.v1 import decode_service_pb2
from headrace.v1 import hold_service_pb2 as pb
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.request import SamplingParams, hash_tokens
from headrace_core.testing.async_test import async_test, eventually
from headrace_core.testing.fake_model import FakeModel, loaded_fake_model
from headrace_core.testing.garbler import NO_MESSAGE
from headrace_core.testing.hold_proxy import HoldProxy, changing
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.mini_taker import MiniTaker
from headrace_core.testing.worker_pair import running
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=8, ignore_eos=True, stop_token_ids=(96,))
PROMPT = list(range(1, 23))
OTHER = [7, *PROMPT[1:]]
"""As many tokens, the first one another: the same pages in number and size."""
DECODE, PREFILL, CHANNEL = (
    decode_service_pb2.FAILURE_SIDE_DECODE,
    decode_service_pb2.FAILURE_SIDE_PREFILL,
    decode_service_pb2.FAILURE_SIDE_CHANNEL,
)


def prefill_service(*, model: FakeModel | None = None, **settings) -> PrefillService:
    loaded = loaded_fake_model(model=model)
    return PrefillService(PrefillSettings(model=".", **settings), loader=lambda _: loaded)


def decode_service(role: Literal["decode", "both"] = "decode", **loaded: Any) -> DecodeService:
    model = loaded_fake_model(**loaded)
    return DecodeService(DecodeSettings(model=".", role=role), loader=lambda _: model)


def admitted(change):
    return changing("admitted", change)


def run(change):
    return changing("run", change)


def last(change):
    return changing("last", change)


def twice(kind):
    return lambda event: [event, event] if event.HasField(kind) else [event]


def without(kind):
    return lambda event: [] if event.HasField(kind) else [event]


def _swap(message):
    first = message.checksums[0].page_xxh3[0]
    message.checksums[0].page_xxh3[0] = first ^ 1


def _count(message, num_tokens):
    message.num_tokens, message.sampling_state.position = num_tokens, num_tokens + 1


TAMPERED = {
    "other model": (admitted(lambda it: setattr(it, "model_fingerprint", "beef")), "MODEL_MISMATCH", CHANNEL),
    "other width": (admitted(lambda it: setattr(it.layout.latent, "rope_dim", 2)), "LAYOUT_MISMATCH", CHANNEL),
    "other dtype": (admitted(lambda it: setattr(it.layout, "dtype", 2)), "LAYOUT_MISMATCH", CHANNEL),
    "unknown dtype": (admitted(lambda it: setattr(it.layout, "dtype", 9)), "PROTOCOL", PREFILL),
    "no layout": (admitted(lambda it: it.ClearField("layout")), "PROTOCOL", PREFILL),
    "no lease": (admitted(lambda it: it.ClearField("lease_key")), "PROTOCOL", PREFILL),
    "other lease": (admitted(lambda it: setattr(it, "lease_key", "0" * 32)), "LEASE_ENDED", PREFILL),
    "no shard": (admitted(lambda it: it.ClearField("shards")), "PROTOCOL", PREFILL),
    "half a shard": (admitted(lambda it: setattr(it.shards[0], "num_layers", 1)), "PROTOCOL", PREFILL),
    "heads": (admitted(lambda it: setattr(it.shards[0], "num_heads", 1)), "PROTOCOL", PREFILL),
    "nowhere": (admitted(lambda it: it.shards[0].ClearField("endpoint")), "PROTOCOL", PREFILL),
    "other process": (admitted(lambda it: setattr(it.shards[0], "incarnation", 1)), "WORKER_RESTARTED", PREFILL),
    "no transport": (admitted(lambda it: it.shards[0].ClearField("transports")), "NO_COMMON_TRANSPORT", CHANNEL),
    "admitted twice": (twice("admitted"), "PROTOCOL", PREFILL),
    "never admitted": (without("admitted"), "PROTOCOL", PREFILL),
    "page that is not": (run(lambda it: it.pages.pop()), "PROTOCOL", PREFILL),
    "page too many": (run(lambda it: setattr(it, "first_page", 1)), "PROTOCOL", PREFILL),
    "layer too many": (run(lambda it: setattr(it, "first_layer", 1)), "PROTOCOL", PREFILL),
    "run of nothing": (run(lambda it: it.Clear()), "PROTOCOL", PREFILL),
    "run twice": (twice("run"), "PROTOCOL", PREFILL),
    "other checksum": (run(_swap), "CHECKSUM", CHANNEL),
    "token twice": (twice("last"), "PROTOCOL", PREFILL),
    "other count": (last(lambda it: _count(it, 21)), "BAD_HANDOFF", PREFILL),
    "odd position": (last(lambda it: setattr(it, "num_tokens", 21)), "PROTOCOL", PREFILL),
    "other seed": (last(lambda it: setattr(it.sampling_state, "seed", 5)), "BAD_HANDOFF", PREFILL),
    "other sample": (last(lambda it: setattr(it.sampling_state, "sample_index", 5)), "BAD_HANDOFF", PREFILL),
    "other tokens": (last(lambda it: setattr(it, "tokens_sha256", hash_tokens(OTHER))), "TOKENS_MISMATCH", CHANNEL),
    "tokens unsaid": (last(lambda it: it.ClearField("tokens_sha256")), "TOKENS_MISMATCH", CHANNEL),
    "no such token": (last(lambda it: setattr(it, "token_id", 97)), "PROTOCOL", PREFILL),
    "a stop token": (last(lambda it: setattr(it, "token_id", 96)), "BAD_HANDOFF", PREFILL),
    "an end that is none": (last(lambda it: setattr(it, "finish_reason", 1)), "BAD_HANDOFF", PREFILL),
    "unknown end": (last(lambda it: setattr(it, "finish_reason", 77)), "PROTOCOL", PREFILL),
    "confirmed unasked": (lambda event: [event, pb.HoldResponse(confirmed=pb.Confirmed())], "PROTOCOL", PREFILL),
    "no message": (lambda event: [NO_MESSAGE], "PROTOCOL", PREFILL),
}


@pytest.mark.parametrize("name", TAMPERED)
@async_test
async def test_what_a_holder_says_is_checked(name: str):
    rewrite, reason, side = TAMPERED[name]
    async with (
        running(prefill_service(), decode_service()) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):
        proxy.rewrite = rewrite
        collected = router.start("r", PROMPT, params=GREEDY)
        assert (await collected.wait_failure()).reason == reason
        assert collected.side == side
        assert collected.joined is None


ORDERS = {
    "other model": (lambda it: setattr(it, "model_fingerprint", "beef"), "MODEL_MISMATCH"),
    "other layout": (lambda it: setattr(it.layout.latent, "rope_dim", 2), "LAYOUT_MISMATCH"),
    "no layout": (lambda it: it.ClearField("layout"), "BAD_HANDOFF"),
    "other tokens": (lambda it: setattr(it, "tokens_sha256", hash_tokens(OTHER)), "TOKENS_MISMATCH"),
    "tokens unsaid": (lambda it: it.ClearField("tokens_sha256"), "TOKENS_MISMATCH"),
    "no router": (lambda it: it.ClearField("router_id"), "BAD_REQUEST"),
    "no time": (lambda it: it.ClearField("timeout_ms"), "BAD_REQUEST"),
    "no attempt": (lambda it: it.ClearField("attempt"), "BAD_REQUEST"),
    "bad id": (lambda it: setattr(it, "request_id", "not an id"), "BAD_REQUEST"),
    "no seed": (lambda it: it.sampling.ClearField("seed"), "BAD_SAMPLING"),
}


@pytest.mark.parametrize("name", ORDERS)
@async_test
async def test_what_a_taker_orders_is_checked(name: str):
    change, reason = ORDERS[name]
    async with running(prefill_service()) as (prefill,), MiniTaker(prefill) as taker:
        assert (await taker.order("r", PROMPT, params=GREEDY, change=change).refused()).reason == reason


@async_test
async def test_a_worker_with_other_pages_is_refused_before_a_byte_moves():
    async with (
        running(prefill_service(), decode_service(page_size=8)) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        collected = router.start("r", PROMPT, params=GREEDY)
        assert (await collected.wait_failure()).reason == "LAYOUT_MISMATCH"
        assert collected.side == PREFILL, "it was the first to see it"


@async_test
async def test_a_page_reused_behind_the_lease_is_noticed():
    prefiller = prefill_service()
    async with (
        running(prefiller, decode_service()) as (prefill, decode),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
    ):

        def reuse(event):
            if event.HasField("run"):
                (lease,) = prefiller.leases.leases
                sealed = lease.runs[-1]
                lease.runs[-1] = type(sealed)(
                    sealed.first_layer,
                    sealed.first_page,
                    sealed.page_ids,
                    (sealed.generations[0] - 1, *sealed.generations[1:]),
                    sealed.checksums,
                )
            return [event]

        proxy.rewrite = reuse
        collected = router.start("r", PROMPT, params=GREEDY)
        assert ((await collected.wait_failure()).reason, collected.side) == ("STALE_PAGE", PREFILL)


@async_test
async def test_lease_keys_can_not_be_guessed():
    async with running(prefill_service()) as (prefill,), MiniTaker(prefill) as taker:
        orders = [taker.order(f"r{i}", PROMPT, params=GREEDY) for i in range(4)]
        keys = {(await order.wait_admitted()).lease_key for order in orders}
        assert len(keys) == 4
        assert all(len(key) == 32 and int(key, 16) for key in keys)


@async_test
async def test_a_higher_attempt_at_the_holder_takes_the_place_of_a_lower_one():
    """As when the worker that took it hangs: its pages are freed at once, and it is told when it asks."""
    prefiller = prefill_service()
    async with (
        running(prefiller) as (prefill,),
        MiniTaker(prefill, router_id=5) as hanging,
        MiniTaker(prefill, router_id=5) as next_one,
        MiniTaker(prefill, router_id=6) as stranger,
    ):
        first = hanging.order("r", PROMPT, params=GREEDY)
        await first.wait_runs()
        other = stranger.order("r", PROMPT, params=GREEDY)
        await other.wait_runs()
        second = next_one.order("r", PROMPT, params=GREEDY, attempt=2)
        assert (await first.refused()).reason == "STALE_ATTEMPT"
        await second.wait_runs()
        late = hanging.order("r", PROMPT, params=GREEDY, attempt=1)
        assert (await late.refused()).reason == "STALE_ATTEMPT"
        assert {lease.order.spec.attempt for lease in prefiller.leases.leases if lease.order.owner[0] == 5} == {2}
        assert not other.is_over, "another router's sequence of the same number"


@async_test
async def test_a_second_start_with_a_higher_attempt_aborts_the_first():
    model = FakeModel()
    async with (
        running(prefill_service(), decode_service(model=model)) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        model.hold(after=2)
        first = router.start("r", PROMPT, params=GREEDY)
        await first.wait_tokens(3)
        second = router.start("r", PROMPT, params=GREEDY, attempt=2)
        assert (await first.wait_failure()).reason == "STALE_ATTEMPT"
        model.release()
        assert len(await second.tokens()) == 8
        router.outputs.pop((1, 1))
        model.hold()
        again = router.start("r", PROMPT, params=GREEDY, attempt=3)
        await again.wait_joined()
        stale = router.start("r", PROMPT, params=GREEDY, attempt=2)
        assert (await stale.wait_failure()).reason == "STALE_ATTEMPT"
        model.release()
        await again.wait_end()


@async_test
async def test_a_cancel_is_for_its_attempt_and_those_before():
    model = FakeModel()
    decoder = decode_service(model=model)
    async with (
        running(prefill_service(), decoder) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        model.hold(after=1)
        second = router.start("r", PROMPT, params=GREEDY, attempt=2)
        await second.wait_joined()
        cancel = decode_service_pb2.CancelSequence(sequence_number=1, attempt=1)
        router.send(decode_service_pb2.SessionRequest(cancel=cancel))
        third = router.start("after", PROMPT, params=GREEDY)
        await eventually(lambda: decoder.num_sequences == 2, "the cancel came before")
        model.release()
        assert len(await second.tokens()) == 8
        await third.wait_end()


@async_test
async def test_the_tokens_that_an_earlier_attempt_produced_count_too():
    retry = {"attempt": 2, "num_prompt_tokens": len(PROMPT)}
    async with (
        running(prefill_service(), decode_service(), decode_service("both")) as (prefill, decode, whole),
        MiniRouter(prefill=prefill, decode=decode) as router,
        MiniRouter(decode=whole) as alone,
    ):
        known = [*PROMPT, 40, 41, 42]
        expected = await alone.generate("r", known, params=GREEDY, **retry)
        collected = router.start("r", known, params=GREEDY, **retry)
        assert await collected.tokens() == expected
        assert len(expected) == 5


@async_test
async def test_rule_2_control_and_bytes_use_different_connections():
    peers: dict[str, set[str]] = {"Hold": set(), "Pull": set()}
    prefiller = prefill_service()
    door = prefiller.host.server.door
    enter, receive = door.enter, door.receive

    def watching(method, context, decode):
        if "/Hold" in method:
            peers["Hold"].add(context.peer())
        return enter(method, context, decode)

    async def watching_receive(method, context, decode):
        if "/Pull" in method:
            peers["Pull"].add(context.peer())
        return await receive(method, context, decode)

    door.enter, door.receive = watching, watching_receive
    async with (
        running(prefiller, decode_service()) as (prefill, decode),
        MiniRouter(prefill=prefill, decode=decode) as router,
    ):
        await asyncio.gather(*(router.generate(f"r{i}", PROMPT, params=GREEDY) for i in range(3)))
    assert len(peers["Hold"]) == len(peers["Pull"]) == 1
    assert peers["Hold"].isdisjoint(peers["Pull"])


FOREIGN = {
    "as it is": lambda it: None,
    "with a hash that says so": lambda it: setattr(it, "tokens_sha256", hash_tokens(OTHER)),
    "with no hash": lambda it: it.ClearField("tokens_sha256"),
}


@pytest.mark.parametrize("tamper", FOREIGN.values(), ids=FOREIGN)
@async_test
async def test_no_request_computes_on_pages_that_were_passed_off_as_those_of_other_tokens(tamper):
    """A proxy orders other tokens than the taker asked for. The worker would find such pages in its prefix cache."""
    async with (
        running(prefill_service(), decode_service("both"), decode_service("both")) as (prefill, decode, clean),
        HoldProxy(prefill) as proxy,
        MiniRouter(prefill=proxy.address, decode=decode) as router,
        MiniRouter(decode=clean) as clean_router,
    ):

        def order_others(message):
            del message.token_ids[:]
            message.token_ids.extend(PROMPT)
            message.tokens_sha256 = hash_tokens(PROMPT)

        proxy.rewrite_open = order_others
        proxy.rewrite = last(tamper)
        collected = router.start("r", OTHER, params=GREEDY)
        await collected.wait_end()
        later = [*OTHER, *collected.token_ids, 30, 31, 32]
        expected = await clean_router.generate_colocated("later", later, params=GREEDY)
        assert await router.generate_colocated("later", later, params=GREEDY) == expected
        assert collected.failure is not None
        assert collected.failure.reason == "TOKENS_MISMATCH"


@async_test
async def test_a_restarted_holder_at_the_same_address_knows_no_lease_of_the_one_before():
    # Its own loopback address: nobody else is given the port while neither process has it.
    first = prefill_service(listen="127.0.0.2:0")
    async with running(decode_service()) as (decode,):
        async with running(first) as (address,), MiniTaker(address) as taker:
            ordered = taker.order("r", PROMPT, params=GREEDY)
            before = await ordered.wait_admitted()
        second = prefill_service(listen=address)
        async with running(second), HoldProxy(address) as proxy:
            shard = before.shards[0]

            def old(message):
                message.lease_key = before.lease_key
                message.shards[0].incarnation = shard.incarnation

            proxy.rewrite = admitted(old)
            async with MiniRouter(prefill=proxy.address, decode=decode) as router:
                collected = router.start("r", PROMPT, params=GREEDY)
                assert ((await collected.wait_failure()).reason, collected.side) == ("WORKER_RESTARTED", PREFILL)
