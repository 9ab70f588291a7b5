"""Whom a worker dials: what a ticket says is not enough (`headrace_core.peers`)."""

import asyncio
import logging
import socket

import pytest
from headrace_client import AsyncClient
from headrace_client import SamplingParams as ClientParams
from headrace_core import address_file
from headrace_core import peers as peers_module
from headrace_core.config import DecodeSettings, PrefillSettings, RouterSettings
from headrace_core.errors import PermissionDeniedError, StartupError, UnavailableError
from headrace_core.peers import Peers
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.mini_router import MiniRouter
from headrace_core.testing.worker_pair import running
from headrace_core.transfer.values import CachedPrefix
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService
from headrace_router.service import RouterService
from headrace_router.testing import write_tokenizer

GREEDY = SamplingParams(temperature=0.0, seed=1, max_tokens=4, ignore_eos=True)
PROMPT = list(range(1, 20))
FINGERPRINT = "fa4e" * 8
NO_ADDRESSES = ["unix:/tmp/s", "unix:/tmp/s:1", "dns:///a:1", "dns://8.8.8.8/a:1", "ipv4:127.0.0.1:1", "127.0.0.1", ""]


async def refused(peers: Peers, endpoint: str) -> str:
    with pytest.raises(PermissionDeniedError) as caught:
        await peers.find(endpoint)
    assert caught.value.reason == "NOT_A_PEER"
    return str(caught.value)


@pytest.mark.parametrize("listed", ["", "10.0.0.1:5"])
@pytest.mark.parametrize("has_tls", [True, False])
@pytest.mark.parametrize("endpoint", NO_ADDRESSES, ids=ascii)
@async_test
async def test_nothing_but_host_and_port_is_dialed(endpoint, has_tls, listed):
    assert "host:port" in await refused(Peers(listed, None, has_tls=has_tls), endpoint)


@async_test
async def test_without_peers_and_certificates_only_this_machine_is_dialed():
    peers = Peers("", None, has_tls=False)
    for endpoint in ("127.0.0.1:5", "127.8.8.8:5", "localhost:5", "[::1]:5"):
        assert await peers.find(endpoint) == endpoint
    for endpoint in ("10.0.0.1:5", "0.0.0.0:5", "[::]:5", "[::ffff:127.0.0.1]:5", "localhost.example:5", "a:5"):
        assert "--peers" in await refused(peers, endpoint)


@async_test
async def test_with_certificates_anybody_is_dialed_who_then_must_show_one():
    peers = Peers("", None, has_tls=True)
    assert await peers.find("prefill-7.example:5") == "prefill-7.example:5"


@async_test
async def test_of_those_listed_the_port_counts_too(tmp_path):
    path = tmp_path / "peers"
    path.write_text("10.0.0.2:5  # the second\n")
    peers = Peers("10.0.0.1:5, [::1]:6", path, has_tls=False)
    for endpoint in ("10.0.0.1:5", "10.0.0.2:5", "[0:0::1]:6"):
        await peers.find(endpoint)
    for endpoint in ("10.0.0.1:6", "10.0.0.3:5", "127.0.0.1:5"):
        assert "--peers" in await refused(peers, endpoint)
    await peers.close()


@async_test
async def test_a_peer_that_has_just_come_is_looked_for_before_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(peers_module, "_LEAST_REFRESH_S", -1.0)
    monkeypatch.setattr(address_file, "STANDS_S", 0.0)
    path = tmp_path / "peers"
    path.write_text("10.0.0.1:5\n")
    peers = Peers("", path, has_tls=False)
    await peers.find("10.0.0.1:5")
    path.write_text("10.0.0.2:5\n")
    assert await peers.find("10.0.0.2:5") == "10.0.0.2:5"
    await refused(peers, "10.0.0.1:5")
    await peers.close()


@async_test
async def test_a_name_stands_for_its_addresses_on_both_sides_and_what_was_checked_is_dialed(monkeypatch):
    names = {
        "prefill": ["10.0.0.1", "10.0.0.2"],
        "pod-2": ["10.0.0.2"],
        "evil": ["10.6.6.6"],
        "two": ["10.6.6.6", "::7"],
    }
    asked = []

    def getaddrinfo(host, port, *_, **__):
        asked.append(host)
        if host not in names:
            raise socket.gaierror(f"no {host}")
        return [(None, None, None, "", (ip, port)) for ip in names[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    peers = Peers("prefill:5", None, has_tls=False)
    assert await peers.find("10.0.0.1:5") == "10.0.0.1:5"
    assert await peers.find("pod-2:5") == "10.0.0.2:5", "the address, not a name that may stand for another one next"
    assert asked.count("prefill") == 1
    for endpoint in ("evil:5", "two:5", "nobody:5", "pod-2:6", "10.6.6.6:5"):
        await refused(peers, endpoint)
    await peers.close()


@async_test
async def test_strangers_addresses_cost_few_look_ups(monkeypatch):
    asked = []

    def getaddrinfo(host, port, *_, **__):
        asked.append(host)
        return [(None, None, None, "", ("10.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(peers_module, "_LEAST_REFRESH_S", 1e6)
    peers = Peers("prefill:5", None, has_tls=False)
    await asyncio.gather(*(refused(peers, f"10.6.{i // 250}.{i % 250}:5") for i in range(1000)))
    assert len(asked) == 1
    await peers.close()


def test_peers_that_are_no_addresses_do_not_start_a_worker():
    with pytest.raises(StartupError, match="--peers: 'unix:/tmp/s'"):
        asyncio.run(_make("unix:/tmp/s"))


async def _make(peers):
    Peers(peers, None, has_tls=False)


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({}, logging.INFO),
        ({"listen": "0.0.0.0:0"}, logging.WARNING),
        ({"listen": "0.0.0.0:0", "peers": "10.0.0.1:5"}, None),
    ],
)
@async_test
async def test_the_start_says_whom_a_worker_dials_unless_somebody_said(settings, level, caplog):
    caplog.set_level(logging.INFO)
    async with running(service(**settings)):
        pass
    said = [record.levelno for record in caplog.records if "takes pages from workers at loopback" in record.message]
    assert said == ([] if level is None else [level])


def service(**settings) -> DecodeService:
    loaded = loaded_fake_model(fingerprint=FINGERPRINT)
    return DecodeService(DecodeSettings(model=".", transport="grpc", **settings), loader=lambda _: loaded)


@async_test
async def test_a_ticket_that_names_a_stranger_is_refused_by_name_and_nobody_is_dialed(tmp_path):
    """Both ways: who is to compute the prompt, and who is said to have its beginning."""
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        address = f"127.0.0.1:{tcp.getsockname()[1]}"
        async with running(service(peers="127.0.0.1:9")) as (decode,), MiniRouter(decode=decode) as router:
            for number, stranger in enumerate((f"unix:{tmp_path}/s", "dns:///localhost:1", address)):
                started = router.start(f"r{number}", PROMPT, params=GREEDY, prefill=stranger)
                failure = await started.wait_failure()
                assert (failure.reason, failure.status) == ("NOT_A_PEER", "PERMISSION_DENIED")
        async with running(service(peers="127.0.0.1:9", role="both")) as (both,), MiniRouter(decode=both) as router:
            for number, stranger in enumerate((f"unix:{tmp_path}/s", address)):
                cached = CachedPrefix(stranger, 1, 16)
                started = router.start(f"r{number}", PROMPT, params=GREEDY, cached=cached, takes_prefix=True)
                assert len(await started.tokens()) == 4, "it is computed"
        for listener in (unix, tcp):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()


@async_test
async def test_a_router_does_not_try_for_ever_what_a_worker_may_not_dial(tmp_path):
    write_tokenizer(tmp_path)
    prefill = PrefillService(PrefillSettings(model="."), loader=lambda _: loaded_fake_model(fingerprint=FINGERPRINT))
    async with running(prefill, service(peers="127.0.0.1:9")) as workers:
        router = RouterService(RouterSettings(model=tmp_path, listen="127.0.0.1:0", workers=",".join(workers)))
        try:
            async with AsyncClient(await router.start()) as client:
                with pytest.raises(UnavailableError, match=f"4 attempts failed; .* NOT_A_PEER: {workers[0]} is none"):
                    await client.generate(PROMPT, ClientParams(max_tokens=2))
        finally:
            await router.stop()
