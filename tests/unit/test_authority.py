"""Every rpc has its callers, everybody else is refused, and what the table does not name is nobody's."""

import contextlib
import shutil
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from unittest import mock

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool
from headrace.v1 import (
    decode_service_pb2,
    generation_service_pb2,
    hold_service_pb2,
    transfer_service_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from headrace_client.certificates import Authority
from headrace_core import rpc
from headrace_core.authority import CALLERS, ServerTls, guard_without_tls
from headrace_core.config import DecodeSettings, PrefillSettings, RouterSettings
from headrace_core.door import Call
from headrace_core.errors import UnauthenticatedError
from headrace_core.identity import ChannelTls, Identity, Peer, Role
from headrace_core.shares import Caller
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.fake_model import loaded_fake_model
from headrace_core.testing.worker_pair import running
from headrace_core.worker.worker_service import LoadBoard, WorkerServicer
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService
from headrace_router.service import RouterService
from headrace_router.testing import write_tokenizer

FILES = (decode_service_pb2, generation_service_pb2, hold_service_pb2, transfer_service_pb2, worker_service_pb2)
OTHERS = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
ROUTER_ONLY = "/headrace.v1.GenerationService/"


def methods():
    services = [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]
    services += [descriptor_pool.Default().FindServiceByName(name) for name in OTHERS]
    return [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]


def test_the_table_has_every_rpc_and_no_other():
    assert set(methods()) == set(CALLERS)


def test_nobody_may_call_what_nobody_serves():
    assert all(CALLERS.values())


def service(role, identities, folder):
    tls = identities / role.value
    if role is Role.ROUTER:
        return RouterService(RouterSettings(model=write_tokenizer(folder / "tiny"), listen="127.0.0.1:0", tls=tls))
    if role is Role.PREFILL:
        return PrefillService(PrefillSettings(model=".", tls=tls), loader=lambda _: loaded_fake_model())
    return DecodeService(DecodeSettings(model=".", tls=tls), loader=lambda _: loaded_fake_model())


@contextlib.asynccontextmanager
async def serving(role, identities, folder):
    it = service(role, identities, folder)
    if role is not Role.ROUTER:
        async with running(it) as (address,):
            yield address
        return
    try:
        yield await it.start()
    finally:
        await it.stop()


def tls_of(identities, caller, server):
    identity = Identity(identities / caller.value, caller)
    return identity.to_router() if server is Role.ROUTER else identity.to_worker()


async def reason(channel, method):
    """Call with an empty message and return why it failed; empty if it did not."""
    call = channel.unary_stream(method)(b"", timeout=WAIT_S)  # to a server one message is as good as a stream of one
    try:
        await call.read()
        call.cancel()
    except grpc.aio.AioRpcError as error:
        return error.code(), rpc.raised_from(error).reason
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize("server", [Role.ROUTER, Role.PREFILL, Role.DECODE])
@async_test
async def test_a_role_may_call_what_the_table_says_and_nothing_else(server, identities, tmp_path):
    async with serving(server, identities, tmp_path) as address:
        for caller in Role:
            async with rpc.channel(address, tls=tls_of(identities, caller, server)) as channel:
                for method in (method for method in CALLERS if not method.endswith("/Drain")):
                    code, why = await reason(channel, method)
                    if code is grpc.StatusCode.UNIMPLEMENTED:
                        continue
                    may = caller in CALLERS[method] and not (caller is Role.CLIENT and server is not Role.ROUTER)
                    assert (why == "WRONG_ROLE") is not may, (caller, method, code, why)
                    assert (code is grpc.StatusCode.PERMISSION_DENIED) is not may


@pytest.mark.parametrize("caller", [role for role in Role if role is not Role.OPERATOR])
@async_test
async def test_only_an_operator_drains(caller, identities, tmp_path):
    drain = "/headrace.v1.WorkerService/Drain"
    async with serving(Role.DECODE, identities, tmp_path) as address:
        async with rpc.channel(address, tls=tls_of(identities, caller, Role.DECODE)) as channel:
            assert await reason(channel, drain) == (grpc.StatusCode.PERMISSION_DENIED, "WRONG_ROLE")
        async with rpc.channel(address, tls=tls_of(identities, Role.OPERATOR, Role.DECODE)) as channel:
            assert await reason(channel, drain) == (grpc.StatusCode.OK, "")


@async_test
async def test_what_the_table_does_not_name_is_nobodys(identities):
    identity = Identity(identities / "decode", Role.DECODE)
    server = rpc.Server(["S"], tls=ServerTls(identity, Role.DECODE))

    async def serve(request, context):
        return b"served"

    handlers = {"New": grpc.unary_unary_rpc_method_handler(serve)}
    server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("S", handlers),))
    address = server.bind("127.0.0.1:0")
    await server.start()
    try:
        for caller in Role:
            async with rpc.channel(address, tls=tls_of(identities, caller, Role.DECODE)) as channel:
                assert await reason(channel, "/S/New") == (grpc.StatusCode.PERMISSION_DENIED, "WRONG_ROLE")
    finally:
        await server.stop(0)


@async_test
async def test_who_shows_no_certificate_or_a_strange_one_does_not_come_in(identities, tmp_path):
    other = Authority.open(tmp_path / "other")
    other.issue(tmp_path / "forged", Peer(Role.ROUTER, "dev"), until=datetime.now(UTC) + timedelta(days=1))
    roots, name = (identities / "ca.crt").read_bytes(), "worker.headrace.internal"
    key, chain = (tmp_path / "forged" / "tls.key").read_bytes(), (tmp_path / "forged" / "tls.crt").read_bytes()
    strangers = {
        "no TLS": None,
        "no certificate": ChannelTls(grpc.ssl_channel_credentials(roots), name),
        "another authority's": ChannelTls(grpc.ssl_channel_credentials(roots, key, chain), name),
    }
    async with serving(Role.DECODE, identities, tmp_path) as address:
        for what, tls in strangers.items():
            async with rpc.channel(address, tls=tls) as channel:
                code, why = await reason(channel, "/grpc.health.v1.Health/Check")
                assert (code, why) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"), what
        async with rpc.channel(address, tls=tls_of(identities, Role.ROUTER, Role.DECODE)) as channel:
            assert await reason(channel, "/grpc.health.v1.Health/Check") == (grpc.StatusCode.OK, "")


@async_test
async def test_a_certificate_of_our_authority_that_names_nobody_of_ours_is_refused(identities, tmp_path, monkeypatch):
    monkeypatch.setattr(Peer, "uri", property(lambda _: "spiffe://elsewhere/router/a"))
    Authority.open(identities).issue(
        tmp_path / "strange", Peer(Role.ROUTER, "a"), until=datetime.now(UTC) + timedelta(days=1)
    )
    monkeypatch.undo()
    pems = [(tmp_path / "strange" / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt")]
    tls = ChannelTls(grpc.ssl_channel_credentials(*pems), "worker.headrace.internal")
    async with serving(Role.DECODE, identities, tmp_path) as address, rpc.channel(address, tls=tls) as channel:
        code, why = await reason(channel, "/grpc.health.v1.Health/Check")
        assert (code, why) == (grpc.StatusCode.UNAUTHENTICATED, "NO_IDENTITY")


@async_test
async def test_a_channel_wants_a_server_of_the_role_it_asks_for(identities, tmp_path):
    async with serving(Role.ROUTER, identities, tmp_path) as address:
        identity = Identity(identities / "operator", Role.OPERATOR)
        async with rpc.channel(address, tls=identity.to_worker()) as channel:
            assert (await reason(channel, "/grpc.health.v1.Health/Check"))[0] is grpc.StatusCode.UNAVAILABLE
        async with rpc.channel(address, tls=identity.to_router()) as channel:
            assert (await reason(channel, "/grpc.health.v1.Health/Check"))[0] is grpc.StatusCode.OK


@async_test
async def test_new_certificates_are_used_without_a_restart(identities, tmp_path):
    """Those of another authority: who has the old ones does not come in any more."""
    shutil.copytree(identities, tmp_path / "set")
    client = Identity(tmp_path / "set" / "operator", Role.OPERATOR)
    async with serving(Role.DECODE, tmp_path / "set", tmp_path) as address:
        before = client.to_worker()
        async with rpc.own_channel(address, tls=before) as channel:
            assert (await reason(channel, "/grpc.health.v1.Health/Check"))[0] is grpc.StatusCode.OK
        new = Authority.open(tmp_path / "new")
        for role in Role:
            until = datetime.now(UTC) + timedelta(days=1)
            new.issue(tmp_path / "set" / role.value, Peer(role, "new"), until=until)
        async with rpc.own_channel(address, tls=client.to_worker()) as channel:
            assert (await reason(channel, "/grpc.health.v1.Health/Check"))[0] is grpc.StatusCode.OK
        async with rpc.own_channel(address, tls=before) as channel:
            assert (await reason(channel, "/grpc.health.v1.Health/Check"))[0] is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("listen", "is_told"), [("127.0.0.1:0", False), ("[::1]:0", False), ("localhost:0", False), ("0.0.0.0:0", True)]
)
@async_test
async def test_plain_text_beyond_this_machine_is_warned_of(listen, is_told, caplog, identities):
    server = rpc.Server([])
    server.bind(listen)
    await server.stop(0)
    assert any("clear text" in record.message for record in caplog.records) is is_told
    caplog.clear()
    server = rpc.Server([], tls=ServerTls(Identity(identities / "decode", Role.DECODE), Role.DECODE))
    server.bind(listen)
    await server.stop(0)
    assert not caplog.records


@pytest.mark.parametrize(
    ("peer", "is_let_in"),
    [
        ("ipv4:127.0.0.1:5", True),
        ("ipv4:127.9.9.9:5", True),
        ("ipv6:%5B::1%5D:5", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:5", True),
        ("ipv4:10.0.0.7:5", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:5", False),
        ("ipv6:%5B2001:db8::1%5D:5", False),
        ("ipv6:%5B::ffff:10.0.0.7%5D:5", False),
        ("unknown:", False),
    ],
)
def test_without_certificates_a_worker_is_drained_from_its_own_machine_alone(peer, is_let_in):
    context = SimpleNamespace(peer=lambda: peer)
    for method, is_refused in (("Drain", not is_let_in), ("GetInfo", False)):
        call = Call(f"/headrace.v1.WorkerService/{method}", Caller("a", "a"), context)
        refusal = pytest.raises(UnauthenticatedError, match="own machine") if is_refused else nullcontext()
        with refusal:
            guard_without_tls(call)


@async_test
async def test_a_server_without_certificates_asks_that():
    """Over a connection whose peer is made one from elsewhere."""
    server = rpc.Server(["a"])
    with mock.patch("headrace_core.authority.is_local", return_value=False):
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(
            WorkerServicer(lambda: None, LoadBoard(), lambda: pytest.fail("it drains")), server.grpc
        )
        address = server.bind("127.0.0.1:0")
        await server.start()
        async with rpc.channel(address) as channel:
            code, why = await reason(channel, "/headrace.v1.WorkerService/Drain")
            assert (code, why) == (grpc.StatusCode.UNAUTHENTICATED, "NO_IDENTITY")
        await server.stop(0)
