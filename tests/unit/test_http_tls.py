"""HTTP under certificates: those of gRPC, asked of clients where gRPC asks, and read again when they change."""

import shutil
import ssl

import pytest
from headrace_client.commands.certs import make
from headrace_core.testing.async_test import async_test
from headrace_router.face.http import connection
from headrace_router.testing import RouterUnderTest

from tests.unit.http_parts import Http


def context(identities, role=None):
    made = ssl.create_default_context(cafile=identities / "client" / "ca.crt")
    if role:
        made.load_cert_chain(identities / role / "tls.crt", identities / role / "tls.key")
    return made


async def ask(router, tls, path="/v1/models"):
    async with Http(router.service.addresses["http_address"], tls=tls) as http:
        http.ask("GET", path)
        return await http.answer()


@async_test
async def test_a_client_shows_its_certificate_and_a_worker_may_not_ask(tmp_path, identities):
    settings = {"tls": identities / "router", "http_listen": "127.0.0.1:0"}
    async with RouterUnderTest(tmp_path, settings=settings) as router:
        assert (await ask(router, context(identities, "client"))).status == 200
        refused = await ask(router, context(identities, "decode"))
        assert (refused.status, refused.error["code"]) == (403, "WRONG_ROLE")
        with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):  # in the handshake, which TLS 1.3 ends late
            await ask(router, context(identities))


@async_test
async def test_a_front_certificate_asks_for_none_and_is_read_again(tmp_path, identities):
    own = tmp_path / "own"
    shutil.copytree(identities / "router", own)
    settings = {"tls_cert": own / "tls.crt", "tls_key": own / "tls.key", "http_listen": "127.0.0.1:0"}
    async with RouterUnderTest(tmp_path, settings=settings) as router:
        assert (await ask(router, context(identities))).status == 200
        make(tmp_path / "others")
        for name in ("tls.crt", "tls.key"):
            shutil.copy(tmp_path / "others" / "router" / name, own / name)
        assert (await ask(router, context(tmp_path / "others"))).status == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            await ask(router, context(identities))


@async_test
async def test_clear_text_is_no_handshake(tmp_path, identities, monkeypatch):
    monkeypatch.setattr(connection, "_LINGER_S", 0.1)
    settings = {"tls": identities / "router", "http_listen": "127.0.0.1:0"}
    async with (
        RouterUnderTest(tmp_path, settings=settings) as router,
        Http(router.service.addresses["http_address"]) as http,
    ):
        http.ask("GET", "/health")
        assert b"HTTP" not in await http.closed()
