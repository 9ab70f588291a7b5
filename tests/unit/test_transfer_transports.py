"""Which transport is used: what a process may use, what a holder's pool is made of, what two workers can prove."""

from __future__ import annotations

from dataclasses import replace

import pytest
from headrace.v1 import types_pb2
from headrace_core.config import DecodeSettings, PrefillSettings, WorkerSettings
from headrace_core.errors import LayoutMismatchError, StartupError
from headrace_core.testing.async_test import async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.handoff_parts import INCARNATION, PlainMemory, StubHolder, holding
from headrace_core.transfer.fake import FakeHolder, FakeTaker
from headrace_core.transfer.grpc import GrpcTaker
from headrace_core.transfer.memory import MemoryKind
from headrace_core.transfer.transport import Reading, TakerEnd, offer_name
from headrace_core.transfer.transports import TRANSPORTS, choose, memory_kind, usable
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService

GRPC = types_pb2.TransportOffer(grpc=types_pb2.GrpcTransport(frame_bytes=1))
FAKE = FakeHolder(holding(StubHolder(()), PlainMemory(), frame_bytes=1, on_sent=lambda _: None)).offer()
UNKNOWN = types_pb2.TransportOffer()
READING = Reading("lease", INCARNATION, b"")


def takers(*names: str) -> dict[str, TakerEnd]:
    made: dict[str, TakerEnd] = {"grpc": GrpcTaker(PlainMemory()), "fake": FakeTaker(PlainMemory())}
    return {name: made[name] for name in names}


@pytest.fixture
def fake_pool():
    holder = FakeHolder(holding(StubHolder(()), PlainMemory(), frame_bytes=1, on_sent=lambda _: None))
    holder.serve(None)
    yield
    holder.close()


@pytest.mark.parametrize(
    ("offers", "names", "chosen"),
    [
        ([GRPC, FAKE], ("grpc", "fake"), "grpc"),
        ([FAKE, GRPC], ("grpc", "fake"), "fake"),
        ([FAKE, GRPC], ("grpc",), "grpc"),
        ([UNKNOWN, GRPC], ("grpc",), "grpc"),
    ],
)
@async_test
async def test_the_first_offer_that_this_worker_can_use_is_taken(fake_pool, offers, names, chosen):
    source = await choose(offers, takers(*names), endpoint="x", reading=READING)
    assert offer_name(source.offer) == chosen
    assert (source.endpoint, source.reading) == ("x", READING)


@async_test
async def test_an_offer_that_can_not_be_proven_leaves_the_next():
    source = await choose([FAKE, GRPC], takers("grpc", "fake"), endpoint="x", reading=READING)
    assert offer_name(source.offer) == "grpc"


@pytest.mark.parametrize(
    ("offers", "names", "said"),
    [
        ([], ("fake",), "10.0.0.7:5000 offers nothing; this worker takes fake"),
        ([UNKNOWN], ("fake", "grpc"), "10.0.0.7:5000 offers nothing; this worker takes fake, grpc"),
        ([GRPC], ("fake",), "10.0.0.7:5000 offers grpc; this worker takes fake"),
        (
            [FAKE, GRPC],
            ("fake",),
            "10.0.0.7:5000 offers fake, grpc; this worker takes fake; fake: the holder's pool is not in this process",
        ),
        (
            [FAKE, FAKE],
            ("fake",),
            "10.0.0.7:5000 offers fake, fake; this worker takes fake; fake: the holder's pool is not in this process; "
            "fake: the holder's pool is not in this process",
        ),
    ],
)
@async_test
async def test_without_a_transport_that_works_both_sides_are_told_why(offers, names, said):
    with pytest.raises(LayoutMismatchError) as raised:
        await choose(offers, takers(*names), endpoint="10.0.0.7:5000", reading=READING)
    assert raised.value.reason == "NO_COMMON_TRANSPORT"
    assert str(raised.value) == said


def test_auto_is_every_transport_that_can_be_had_here_the_best_first():
    assert [name for name in usable("auto") if name != "nixl"] == ["shm", "grpc"]
    assert list(TRANSPORTS) == ["shm", "nixl", "grpc", "fake"]


def lacking(monkeypatch, name: str, problem: str) -> None:
    monkeypatch.setitem(TRANSPORTS, name, replace(TRANSPORTS[name], probe=lambda: problem))


def test_auto_does_without_what_can_not_be_had(monkeypatch):
    for name in ("shm", "nixl"):
        lacking(monkeypatch, name, "not here")
    assert usable("auto") == ("grpc",)


def test_with_tls_nothing_moves_by_itself_that_tls_does_not_guard(monkeypatch, caplog):
    monkeypatch.setitem(TRANSPORTS, "nixl", replace(TRANSPORTS["nixl"], probe=lambda: ""))
    assert usable("auto") == ("shm", "nixl", "grpc")
    assert usable("auto", has_tls=True) == ("shm", "grpc")
    assert usable("nixl") == ("nixl",)
    assert not caplog.records
    assert usable("nixl", has_tls=True) == ("nixl",)
    assert "clear text" in caplog.text


@pytest.mark.parametrize("name", ["grpc", "shm"])
def test_a_name_is_that_transport_alone(name: str):
    assert usable(name) == (name,)


@pytest.mark.parametrize("make", [PrefillService, DecodeService])
@async_test
async def test_a_worker_does_not_start_with_a_transport_that_can_not_be_had(make):
    with pytest.MonkeyPatch.context() as patch:
        lacking(patch, "shm", "no such memory")
        settings: WorkerSettings = (PrefillSettings if make is PrefillService else DecodeSettings)(
            model=".", transport="shm"
        )
        with pytest.raises(StartupError) as raised:
            make(settings, loader=lambda _: loaded_fake_model())
    assert (raised.value.reason, str(raised.value)) == ("NO_TRANSPORT", "--transport shm: no such memory")


def test_a_pool_is_plain_memory_unless_a_transport_needs_other():
    assert memory_kind(("grpc", "fake")) is MemoryKind.PLAIN
    assert memory_kind(usable("auto")) is MemoryKind.MEMFD
    assert memory_kind(()) is MemoryKind.PLAIN
