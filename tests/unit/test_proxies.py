"""Proxies that the environment names are for what is outside, and for nothing between our processes."""

import asyncio
import socket
import threading

import pytest
from headrace_client import AsyncClient, Client, ConnectionOptions
from headrace_client.retry import RetryPolicy
from headrace_client.top.samples import scrape
from headrace_core import probe, rpc
from headrace_core.errors import HeadraceError
from headrace_core.metrics_page import read_metrics
from headrace_core.telemetry import serve_metrics
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_router import FakeRouter
from prometheus_client import CollectorRegistry, Gauge

ELSEWHERE = "router.example:50050"


class Proxy:
    """Refuses every request, and keeps their first lines."""

    def __init__(self):
        self.asked = []
        self.is_asked = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(4096).split(b"\r\n")[0].decode())
                self.is_asked.set()
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def proxy(monkeypatch):
    proxy = Proxy()
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv(name.upper(), proxy.url)
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("connect", [rpc.channel, rpc.own_channel])
def test_processes_reach_each_other_directly(proxy, connect):
    async def main():
        server = rpc.Server(["headrace.v1.WorkerService"])
        address = server.bind("127.0.0.1:0")
        await server.start()
        await server.set_ready(True)
        for host in ("127.0.0.1", "localhost"):
            async with connect(f"{host}:{address.rpartition(':')[2]}") as channel:
                await asyncio.wait_for(channel.channel_ready(), WAIT_S)
        said = await asyncio.to_thread(probe.probe, address)
        await server.stop(0)
        # Nobody is there; who goes by the proxy asks it all the same.
        async with connect(ELSEWHERE) as channel:
            channel.get_state(try_to_connect=True)
            await channel.wait_for_state_change(channel.get_state())
        return said

    assert asyncio.run(main()) == ""
    assert proxy.asked == []


def test_a_client_on_the_router_s_machine_goes_there_directly(proxy):
    async def main(address):
        async with AsyncClient(address) as client:
            await client.server_info()

    with FakeRouter() as router:
        asyncio.run(main(router.address))
        with Client(router.address) as client:
            client.server_info()
    assert proxy.asked == []


def test_a_client_elsewhere_goes_as_its_environment_says(proxy, monkeypatch):
    async def main():
        options = ConnectionOptions(retry=RetryPolicy(max_attempts=1))
        async with AsyncClient(ELSEWHERE, options) as client:
            with pytest.raises(HeadraceError):
                await client.server_info(timeout_s=1)

    asyncio.run(main())
    assert set(proxy.asked) == {f"CONNECT {ELSEWHERE} HTTP/1.1"}
    proxy.asked.clear()
    monkeypatch.setenv("no_proxy", "router.example")
    asyncio.run(main())
    assert proxy.asked == []


def test_metrics_are_read_directly(proxy):
    registry = CollectorRegistry()
    Gauge("wheels", "Wheels.", registry=registry).set(3)
    address = serve_metrics("127.0.0.1:0", registry, "router")
    assert "wheels" in read_metrics(address, WAIT_S)
    found = scrape(address, 0.0)
    assert found is not None
    assert found.total("wheels") == 3
    assert proxy.asked == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:4294967295", "127.0.0.1:nonsense", "no such host:1"])
def test_metrics_that_can_not_be_had_are_told_in_one_line(address):
    with pytest.raises(ValueError, match="no metrics at ") as caught:
        read_metrics(address, 1.0)
    assert "\n" not in str(caught.value)
    assert scrape(address, 0.0) is None


def test_what_serves_no_metrics_is_told_in_one_line():
    async def main():
        server = rpc.Server(["headrace.v1.WorkerService"])
        address = server.bind("127.0.0.1:0")
        await server.start()
        with pytest.raises(ValueError, match="no metrics at "):
            await asyncio.to_thread(read_metrics, address, 5.0)
        await server.stop(0)

    asyncio.run(main())
