"""Our workers keep every rule of the wire; made wrong in one way, they break the rule that is about it."""

import pytest
from headrace.v1 import types_pb2
from headrace_core import beats
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_core.errors import HandoffLostError, HeadraceError, InvalidRequestError
from headrace_core.request import hash_tokens
from headrace_core.testing import conformance
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.holder_rules import HOLDER_RULES
from headrace_core.testing.taker_rules import TAKER_RULES
from headrace_core.testing.worker_pair import running
from headrace_core.transfer import grpc as grpc_transport
from headrace_core.transfer import hold, sealer, taker, values, verify
from headrace_core.transfer.hold import HoldCall, Side, TakeError
from headrace_core.transfer.lease import LeaseTable
from headrace_core.transfer.states import TAKE_MOVES, TakeEvent, TakeState
from headrace_core.transfer.transport import Source, offer_name
from headrace_core.worker.prefix_fetcher import PrefixFetcher
from headrace_decode import sequence as decode_sequence
from headrace_decode.service import DecodeService
from headrace_prefill import scheduler as prefill_scheduler
from headrace_prefill import service as prefill_module
from headrace_prefill.service import PrefillService

SHORT_S = 2.0
"""How long a rule may take that waits for a refusal which never comes."""


def prefill_service() -> PrefillService:
    loaded = loaded_fake_model()
    return PrefillService(PrefillSettings(model=".", frame_kib=4), loader=lambda _: loaded)


def decode_service() -> DecodeService:
    loaded = loaded_fake_model()
    return DecodeService(DecodeSettings(model="."), loader=lambda _: loaded)


@pytest.fixture
def quick_beats(monkeypatch):
    monkeypatch.setattr(beats, "BEAT_S", 0.1)


@async_test
async def test_a_prefill_worker_keeps_every_rule():
    async with running(prefill_service()) as (address,):
        verdicts = await conformance.check_holder(address, limit_s=WAIT_S)
    assert len(verdicts) == len(HOLDER_RULES.names)
    assert not [verdict for verdict in verdicts if verdict.problem]


@async_test
async def test_a_decode_worker_keeps_every_rule():
    async with running(decode_service()) as (address,):
        verdicts = await conformance.check_taker(address, limit_s=WAIT_S)
    assert len(verdicts) == len(TAKER_RULES.names)
    assert not [verdict for verdict in verdicts if verdict.problem]


class _Same(bytes):
    """Equal to whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


class _Deaf:
    """A `Silence` that never notices."""

    def __init__(self, on_silent: object) -> None: ...

    def heard(self) -> None: ...

    def close(self) -> None: ...


def _nothing(*_: object, **__: object) -> None: ...


def _orders(change):
    """Let the holder take an order as if it were another one."""
    real = values.decode_order

    def decode(message):
        change(message)
        message.tokens_sha256 = hash_tokens(list(message.token_ids))
        return real(message)

    return lambda patch: patch.setattr(hold, "decode_order", decode)


def _looks(change):
    """Let the holder show pages otherwise: `change(table, reading, part)` returns another reading."""
    real = LeaseTable.held_pages

    def held_pages(table, reading, **part):
        return real(table, change(table, reading), **part)

    return lambda patch: patch.setattr(LeaseTable, "held_pages", held_pages)


def _with(reading, **other):
    return type(reading)(**({name: getattr(reading, name) for name in reading.__slots__} | other))


def _shows_anything(patch):
    real = LeaseTable.held_pages

    def held_pages(table, reading, **part):
        try:
            return real(table, reading, **part)
        except (HandoffLostError, InvalidRequestError):
            return [0] * part["num_pages"]

    patch.setattr(LeaseTable, "held_pages", held_pages)


def _first_page_always(patch):
    real = LeaseTable.held_pages
    whole = {"first_layer": 0, "num_layers": 2, "first_page": 0, "num_pages": 2}
    patch.setattr(
        LeaseTable, "held_pages", lambda table, reading, **part: real(table, reading, **whole)[: part["num_pages"]]
    )


def _any_attempt(patch):
    real = LeaseTable.create

    def create(table, order):
        table._by_owner.pop(order.owner, None)
        return real(table, order)

    patch.setattr(LeaseTable, "create", create)
    real_end = LeaseTable._end

    def end(table, lease, *more):
        table._by_owner.setdefault(lease.order.owner, lease)
        real_end(table, lease, *more)

    patch.setattr(LeaseTable, "_end", end)


def _never_ends(patch):
    class Rule:
        def __init__(self, *_: object) -> None: ...

        def reason(self, *_: object, **__: object) -> None: ...

    patch.setattr(prefill_scheduler, "FinishRule", Rule)


def _never_beats(patch):
    def quiet(beat):
        outbox = beats.Outbox(beat)
        outbox.period_s = 1000.0
        return outbox

    patch.setattr(hold, "Outbox", quiet)
    patch.setattr(hold, "Silence", _Deaf)


def _short_keys(patch):
    names = iter(range(10_000))
    patch.setattr("headrace_core.transfer.lease.secrets.token_hex", lambda _: str(next(names)))


def _long_frames(patch):
    offer = types_pb2.TransportOffer(grpc=types_pb2.GrpcTransport(frame_bytes=16))
    patch.setattr(grpc_transport.GrpcHolder, "offer", lambda _: offer)


def _keeps_pages(patch):
    patch.setattr(PrefillService, "_on_lease_end", _nothing)


def _no_incarnation(patch):
    patch.setattr("headrace_core.worker.host.secrets.randbits", lambda _: 0)


def _bad_sums(patch):
    patch.setattr(sealer, "checksums", lambda memory, layers, page_ids: tuple((7,) * len(page_ids) for _ in layers))


def _unzeroed(patch):
    patch.setattr("headrace_core.model.kv_cache.KvCache.zero_pages", _nothing)


def _mute_reasons(patch):
    patch.setattr(hold, "InvalidRequestError", lambda reason, text: HeadraceError("BUG", text))


def _set(name, value):
    return lambda message: setattr(message, name, getattr(message, name) or value)


def _seeded(message):
    message.sampling.seed = 1


def _token(message):
    if not message.token_ids:
        message.token_ids.append(1)
        message.num_prompt_tokens = 1


def _inside(message):
    message.token_ids[0] = 1


def patched(target, name, value=_nothing):
    return lambda patch: patch.setattr(target, name, value)


NOTHING_AT_HAND = patched(values.Order, "num_have_pages", 0)

WRONG_HOLDERS = {
    "it says who it is": _no_incarnation,
    "a sequence is admitted sealed told and confirmed": patched(prefill_module, "hash_tokens", lambda ids: bytes(32)),
    "the bytes of a run have its checksums": _bad_sums,
    "slots past the last token are zero": _unzeroed,
    "a part of a run can be pulled": _first_page_always,
    "no frame is longer than offered": _long_frames,
    "another model is refused": patched(prefill_module, "check_compatible"),
    "another layout is refused": patched(prefill_module, "check_compatible"),
    "a hash that is not that of the tokens is refused": patched(values, "hash_tokens", lambda ids: _Same(32)),
    "an order names its router": _orders(_set("router_id", 1)),
    "an order says how long it has": _orders(_set("timeout_ms", 60_000)),
    "attempts count from 1": _orders(_set("attempt", 1)),
    "a seed must be set": _orders(_seeded),
    "an empty prompt is refused": _orders(_token),
    "a token outside the vocabulary is refused": _orders(_inside),
    "pages are shown to who has the key alone": _shows_anything,
    "a read names the process": _looks(lambda table, reading: _with(reading, incarnation=table._incarnation)),
    "a read says what it takes the pages for": _looks(
        lambda table, reading: _with(reading, tokens_sha256=table._by_key[reading.lease_key].order.tokens_sha256)
    ),
    "what is not sealed is not shown": _shows_anything,
    "a confirmed lease is over": _shows_anything,
    "a taker that leaves ends its lease": _shows_anything,
    "a higher attempt takes the place of a lower one": _any_attempt,
    "lease keys are not used twice": _short_keys,
    "a call begins with an order": _mute_reasons,
    "a call is for one sequence": _mute_reasons,
    "what the taker has is not sealed": NOTHING_AT_HAND,
    "what the taker has are pages of the sequence": _orders(lambda it: it.ClearField("num_have_tokens")),
    "what a prefill worker has cached is not given away": _orders(lambda it: it.ClearField("holder_incarnation")),
    "a cached prefix that is not to be had is computed": patched(PrefixFetcher, "fetch"),
    "a first token may be the last": _never_ends,
    "nothing is held past its time": patched(values, "timeout_s", lambda ms: 1000.0),
    "it beats while it has nothing to say": _never_beats,
    "a taker that falls silent ends its lease": patched(hold, "Silence", _Deaf),
    "every page is free at the end": _keeps_pages,
}


@pytest.mark.usefixtures("quick_beats")
@pytest.mark.parametrize("rule", HOLDER_RULES.names)
@async_test
async def test_a_prefill_worker_that_is_wrong_breaks_the_rule(rule: str, monkeypatch):
    with monkeypatch.context() as patch:
        WRONG_HOLDERS[rule](patch)
        service = prefill_service()
        address = await service.start()
        try:
            (verdict,) = await conformance.check_holder(address, limit_s=SHORT_S, only=rule)
        finally:
            await service.stop()
    assert verdict.problem


def _lax(state: TakeState, event: TakeEvent, after: TakeState):
    return lambda patch: patch.setitem(TAKE_MOVES, (state, event), after)


def _any_offer(patch):
    async def choose(offers, takers, *, endpoint, reading):
        grpc = types_pb2.TransportOffer(grpc=types_pb2.GrpcTransport(frame_bytes=1024))
        return Source(endpoint, reading, next((offer for offer in offers if offer_name(offer) in takers), grpc))

    patch.setattr(taker, "choose", choose)


def _deaf_to_pulls(patch):
    patch.setattr(grpc_transport, "_lost", lambda error, endpoint: HandoffLostError("HOLDER_LOST", "it did not come"))


def _deaf_to_reasons(patch):
    lost = TakeError(Side.CHANNEL, HandoffLostError("HOLDER_LOST", "it is gone"))
    patch.setattr(HoldCall, "_lost", lambda call, error: lost)


def _says_to_have_more(patch):
    real = values.encode_order

    def encode(order):
        message = real(order)
        message.num_have_tokens += message.num_have_tokens and order.layout.page_size
        return message

    patch.setattr(hold, "encode_order", encode)


def _told_twice(patch):
    real = TAKE_MOVES[TakeState.PULLING, TakeEvent.LAST]
    for state in (TakeState.FINISHING, TakeState.CONFIRMING):
        patch.setitem(TAKE_MOVES, (state, TakeEvent.LAST), real)


_UNCHECKED = patched(taker, "check_first")
_UNREQUIRED = patched(values, "_require")


def _takes_anyone(patch):
    open_session = DecodeService.open_session
    patch.setattr(DecodeService, "open_session", lambda it, router, **_: open_session(it, router))


WRONG_TAKERS = {
    "a session with another process is refused": _takes_anyone,
    "a hand off is taken and goes on": patched(decode_sequence, "hash_tokens", lambda ids: bytes(32)),
    "what it says it has it has": _says_to_have_more,
    "a page that it has does not come again": patched(taker, "_require"),
    "another model is refused": patched(taker, "check_compatible"),
    "another layout is refused": patched(taker, "check_compatible"),
    "an admission names a lease": _UNREQUIRED,
    "an admission names a shard": _UNREQUIRED,
    "no transport in common is refused": _any_offer,
    "a lease that is not held is lost": _deaf_to_pulls,
    "another process is refused": _deaf_to_pulls,
    "a sequence is admitted once": _lax(TakeState.PULLING, TakeEvent.ADMITTED, TakeState.PULLING),
    "nothing comes before admission": _lax(TakeState.OPENED, TakeEvent.RUN, TakeState.PULLING),
    "a page is sealed once": patched(taker, "_require"),
    "a run stays inside its sequence": patched(taker, "_require"),
    "a run has checksums for all its pages": _UNREQUIRED,
    "a first token comes once": _told_twice,
    "other tokens are refused": _UNCHECKED,
    "another number of tokens is refused": _UNCHECKED,
    "another seed is refused": _UNCHECKED,
    "nothing is confirmed unasked": _lax(TakeState.OPENED, TakeEvent.CONFIRMED, TakeState.OPENED),
    "other checksums are refused": patched(verify, "check_bytes"),
    "a token outside the vocabulary is refused": _UNCHECKED,
    "bytes that changed on their way are refused": patched(verify, "check_bytes"),
    "a page that was reused is refused": _deaf_to_pulls,
    "the reason of a holder is passed on": _deaf_to_reasons,
    "a holder that falls silent is lost": patched(hold, "Silence", _Deaf),
    "a cancelled sequence ends its call": patched(DecodeService, "cancel_sequence"),
    "a sequence ends when its time is up": patched(decode_sequence, "timeout_s", lambda ms: 1000.0),
    "a higher attempt takes the place of a lower one": patched(DecodeService, "_sequence"),
}


@pytest.mark.usefixtures("quick_beats")
@pytest.mark.parametrize("rule", TAKER_RULES.names)
@async_test
async def test_a_decode_worker_that_is_wrong_breaks_the_rule(rule: str, monkeypatch):
    with monkeypatch.context() as patch:
        WRONG_TAKERS[rule](patch)
        service = decode_service()
        address = await service.start()
        try:
            (verdict,) = await conformance.check_taker(address, limit_s=SHORT_S, only=rule)
        finally:
            await service.stop()
    assert verdict.problem
