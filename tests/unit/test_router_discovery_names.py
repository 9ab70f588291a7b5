"""Names of workers are looked up: slow ones hold up no other, and what is gone is forgotten at last."""

import asyncio
import socket
import threading

from headrace_core import discovery
from headrace_core.address_file import STANDS_S
from headrace_core.discovery import GONE_ANSWERS, Discovery
from headrace_core.testing.async_test import WAIT_S, async_test, eventually
from headrace_core.testing.fake_worker import FakeWorker
from headrace_router.testing import VOCAB_SIZE, RouterUnderTest

from tests.unit.test_router_discovery import Clock


class Resolver:
    """Stands for the system's resolver; `answers` are by name: hosts, or what is raised."""

    def __init__(self, monkeypatch, answers):
        self.answers = answers
        self.asked = []
        self.gate = threading.Event()
        self.gate.set()
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, host, port, *_, **__):
        self.asked.append(host)
        answer = self.answers[host]
        if answer == "slow":
            assert self.gate.wait(WAIT_S)
            answer = ["10.9.9.9"]
        if isinstance(answer, BaseException):
            raise answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answer]


@async_test
async def test_a_name_that_can_not_be_looked_up_costs_itself(monkeypatch, caplog):
    answers = {
        "good": ["10.0.0.1", "fe80::1%eth0"],
        "mixed": ["10.0.0.2", "a..b", "\udcff", "10.0.0.3 "],
        "unknown": OSError("no such name"),
        "malformed": UnicodeError("label empty or too long"),
        "strange": TypeError("a resolver of another kind"),
        "nothing": [None],
    }
    resolver = Resolver(monkeypatch, answers)
    found = Discovery(",".join(f"{name}:5" for name in answers), None)
    expected = ["10.0.0.1:5", "[fe80::1%eth0]:5", "10.0.0.2:5"]
    for _ in range(3):
        found.look_up()
        await eventually(lambda: not found._lookups, "the look-ups end")
        assert found.addresses == expected
    hosts = [record.host for record in caplog.records]
    assert sorted(hosts) == ["malformed", "mixed", "nothing", "strange", "unknown"]
    resolver.answers = dict.fromkeys(answers, OSError("the resolver is gone"))
    found.look_up()
    await eventually(lambda: not found._lookups, "the look-ups end")
    assert found.addresses == expected


@async_test
async def test_slow_names_hold_up_no_other_and_are_asked_for_once(monkeypatch, tmp_path):
    slow = [f"slow-{i}" for i in range(8)]
    path = tmp_path / "workers"
    path.write_text("".join(f"{entry}\n" for entry in (*(f"{name}:5" for name in slow), "10.0.0.1:5", "quick:5")))
    resolver = Resolver(monkeypatch, {**dict.fromkeys(slow, "slow"), "quick": ["10.0.0.2"]})
    resolver.gate.clear()
    found = Discovery("", path)
    clock = Clock(found)
    await found.read_file()
    for _ in range(3):
        found.look_up()
        await eventually(lambda: len(found._lookups) == len(slow), "the quick one is answered")
    assert found.addresses == ["10.0.0.1:5", "10.0.0.2:5"]
    assert {resolver.asked.count(name) for name in slow} == {1}
    path.write_text("10.0.0.1:5\n")
    await clock.read(found)
    await clock.read(found, after_s=STANDS_S)
    resolver.gate.set()
    await eventually(lambda: not found._lookups, "the look-ups end")
    found.look_up()
    assert found.addresses == ["10.0.0.1:5"]
    assert not found._resolved
    assert not found._problems
    await found.close()


@async_test
async def test_a_name_is_waited_for_so_long_and_its_late_answer_is_taken(monkeypatch, caplog):
    monkeypatch.setattr(discovery, "_LOOKUP_TIMEOUT_S", 0.05)
    monkeypatch.setattr(discovery, "_MOST_LOOKUPS", 2)
    resolver = Resolver(monkeypatch, {**{f"slow-{i}": "slow" for i in range(4)}, "quick": ["10.0.0.2"]})
    resolver.gate.clear()
    found = Discovery(",".join(f"{name}:5" for name in resolver.answers), None)
    await eventually(lambda: _looked_up(found) == ["10.0.0.2:5"], "the quick one is answered")
    await eventually(lambda: len(_looked_up(found)) == len(caplog.records) / 4 == 1, "the slow ones are told")
    assert {resolver.asked.count(f"slow-{i}") for i in range(4)} == {1}
    assert [record.problem for record in caplog.records] == ["no answer in 0.05 s"] * 4
    resolver.gate.set()
    await eventually(lambda: _looked_up(found) == ["10.9.9.9:5", "10.0.0.2:5"], "late answers are taken")
    await found.close()


def _looked_up(found):
    found.look_up()
    return found.addresses


NO_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


NO_RESOLVER = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


async def look_up(found, *, times=1):
    for _ in range(times):
        found.look_up()
        await eventually(lambda: not found._lookups, "the look-up ends")


@async_test
async def test_a_name_that_is_gone_keeps_those_that_are_there(monkeypatch):
    resolver = Resolver(monkeypatch, {"decode": ["10.0.0.1", "10.0.0.2"]})
    found = Discovery("decode:5", None)
    await look_up(found)
    resolver.answers["decode"] = NO_NAME
    await look_up(found, times=GONE_ANSWERS - 1)
    found.drop_gone(lambda _: False)
    assert len(found.addresses) == 2, "one such answer may be a mistake"
    await look_up(found)
    found.drop_gone(lambda address: address == "10.0.0.2:5")
    assert found.addresses == ["10.0.0.2:5"]
    found.drop_gone(lambda _: False)
    assert found.addresses == []
    resolver.answers["decode"] = ["10.0.0.2", "10.0.0.3"]
    await look_up(found)
    assert found.addresses == ["10.0.0.2:5", "10.0.0.3:5"]


@async_test
async def test_a_resolver_that_fails_says_nothing_of_a_name(monkeypatch):
    resolver = Resolver(monkeypatch, {"decode": ["10.0.0.1"]})
    found = Discovery("decode:5", None)
    await look_up(found)
    for answer in (NO_NAME, NO_RESOLVER, NO_NAME, ["10.0.0.1"], NO_NAME, NO_RESOLVER, NO_RESOLVER, NO_NAME):
        resolver.answers["decode"] = answer
        await look_up(found)
        found.drop_gone(lambda _: False)
        assert found.addresses == ["10.0.0.1:5"]


def test_a_worker_that_went_away_with_its_name_is_forgotten(tmp_path, monkeypatch):
    async def main():
        worker = FakeWorker("both", vocab_size=VOCAB_SIZE)
        host, port = (await worker.start()).split(":")
        resolver = Resolver(monkeypatch, {"decode": [host]})
        async with RouterUnderTest(tmp_path, settings={"workers": f"decode:{port}"}) as router:
            await router.wait_states(["ready"])
            resolver.answers["decode"] = NO_NAME
            num_asked = len(resolver.asked)
            await eventually(lambda: len(resolver.asked) > num_asked + 2 * GONE_ANSWERS, "the name is gone")
            await router.wait_states(["ready"])
            await worker.stop()
            await router.wait_states([])

    asyncio.run(main())


@async_test
async def test_a_name_for_20_000_hosts_costs_what_is_followed_and_that_once(monkeypatch):
    hosts = [f"10.0.{i >> 8}.{i & 255}" for i in range(20_000)]
    Resolver(monkeypatch, {"many": hosts})
    found = Discovery("many:5", None)
    texts = []
    monkeypatch.setattr(discovery.Address, "__str__", _counting(discovery.Address.__str__, texts))
    for _ in range(3):
        found.look_up()
        await eventually(lambda: not found._lookups, "the look-up ends")
        assert found.addresses == [f"{host}:5" for host in sorted(hosts)[: discovery.MAX_ADDRESSES]]
    # Of each answer what is followed and one more is read; the addresses are put together when it is another one.
    assert len(texts) == 4 * (discovery.MAX_ADDRESSES + 1)


def _counting(function, calls):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted
