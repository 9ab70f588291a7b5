"""The proxy that tests cut connections with: frozen it loses nothing and closes nothing."""

import asyncio

from headrace_core.testing.async_test import async_test
from headrace_core.testing.tcp_proxy import TcpProxy


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while content := await reader.read(100):
        writer.write(content.upper())
        await writer.drain()
    writer.close()


@async_test
async def test_what_is_sent_while_it_is_frozen_comes_when_it_thaws():
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    proxy = TcpProxy()
    await proxy.start()
    proxy.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    host, _, port = proxy.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"one")
    assert await reader.readexactly(3) == b"ONE"
    proxy.freeze()
    writer.write(b"two")
    late_reader, late_writer = await asyncio.open_connection(host, int(port))
    late_writer.write(b"three")
    reading = [asyncio.ensure_future(reader.readexactly(3)), asyncio.ensure_future(late_reader.readexactly(5))]
    for _ in range(100):
        await asyncio.sleep(0)
    assert not any(task.done() for task in reading)
    proxy.thaw()
    assert await asyncio.gather(*reading) == [b"TWO", b"THREE"]
    for each in (writer, late_writer):
        each.close()
    await proxy.close()
    server.close()
