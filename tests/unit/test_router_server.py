"""The router's door: what it refuses and how, who may come in, what it says of itself."""

import asyncio
import socket
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.v1 import generation_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from headrace_core import rpc
from headrace_core.config import RouterSettings
from headrace_core.errors import CheckpointError, StartupError, UnavailableError
from headrace_core.identity import ChannelTls
from headrace_core.testing.api_keys import make_keys
from headrace_core.testing.async_test import WAIT_S
from headrace_router.service import RouterService
from headrace_router.testing import (
    BOS,
    RouterUnderTest,
    byte_ids,
    chat_request,
    run_router,
    scripted_worker,
    text_request,
    tokens_request,
    wait_until,
    write_tokenizer,
)


def test_max_tokens_past_the_context_ends_with_length_at_the_context(tmp_path):
    async def test(router):
        (sample,) = await router.generate(text_request("abc", sampling={"max_tokens": 5000, "min_tokens": 4000}))
        assert sample.last.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert len(sample.token_ids) == 64 - 4

    run_router(tmp_path, [scripted_worker("both", max_context_tokens=64)], test)


def test_defaults_are_filled_in_for_workers(tmp_path):
    async def test(router):
        for _ in range(2):
            await router.generate(text_request("a", sampling={"stop_strings": ["zzz"]}))
        first, second = (call.sampling for call in router.workers[0].starts)
        assert first.max_tokens == 256
        assert first.seed != second.seed
        assert not first.stop_strings
        assert len(router.workers[0].starts[0].request_id) == 24

    run_router(tmp_path, [scripted_worker("both")], test)


def test_text_tokens_and_chat_become_the_right_ids(tmp_path):
    async def test(router):
        short = {"max_tokens": 1}
        await router.generate(text_request("é", sampling=short))
        await router.generate(tokens_request(5, 6, sampling=types_pb2.SamplingParams(**short)))
        await router.generate(chat_request(("user", "hi"), sampling=types_pb2.SamplingParams(**short)))
        await router.generate(text_request("long " * 1000, sampling=short))
        prompts = [list(call.token_ids) for call in router.workers[0].starts]
        assert prompts[:3] == [[BOS, *byte_ids("é")], [5, 6], [BOS, *byte_ids("[user]hi[assistant]")]]
        assert prompts[3] == [BOS, *byte_ids("long " * 1000)]

    run_router(tmp_path, [scripted_worker("both", max_context_tokens=8192, num_pages=1024)], test)


def test_chat_needs_a_template(tmp_path):
    write_tokenizer(tmp_path / "tiny", with_template=False)

    async def test(router):
        assert "no chat template" in str(await router.refused(chat_request(("user", "hi"))))

    run_router(tmp_path, [scripted_worker("both")], test)


def test_requests_wait_for_workers_that_come_later(tmp_path):
    async def test(router):
        running = asyncio.create_task(router.generate(text_request("a", sampling={"max_tokens": 3})))
        await wait_until(lambda: router.service._router.num_queued == 1)
        await router.add(scripted_worker("prefill"))
        await router.add(scripted_worker("decode"))
        assert (await running)[0].text == "Hel"

    run_router(tmp_path, [], test)


def test_a_worker_taken_off_the_list_gets_nothing_new_and_ends_what_it_has(tmp_path):
    async def test(router):
        (first,) = router.workers
        first.faults.join_gate.clear()
        running = asyncio.create_task(router.generate(text_request("a", sampling={"max_tokens": 3})))
        await wait_until(lambda: len(first.starts) == 1)
        router.workers.clear()
        second = await router.add(scripted_worker("both"))
        await router.wait_states(["draining", "ready"])
        await router.generate(text_request("b", sampling={"max_tokens": 3}))
        assert (len(first.starts), len(second.starts)) == (1, 1)
        first.faults.join_gate.set()
        assert (await running)[0].text == "Hel"
        await router.wait_states(["ready"])
        await first.stop()

    run_router(tmp_path, [scripted_worker("both")], test)


def test_a_draining_worker_gets_nothing_new_and_ends_what_it_has(tmp_path):
    async def test(router):
        first = router.workers[0]
        first.faults.join_gate.clear()
        running = asyncio.create_task(router.generate(text_request("a", sampling={"max_tokens": 3})))
        await wait_until(lambda: len(first.starts) == 1)
        first.faults.join_gate.set()
        await first.set_ready(False)
        second = await router.add(scripted_worker("both"))
        await router.wait_states(["draining", "ready"])
        await router.generate(text_request("b", sampling={"max_tokens": 3}))
        assert len(second.starts) == 1
        await running

    run_router(tmp_path, [scripted_worker("both", step_s=0.05)], test)


def test_a_worker_with_another_model_or_layout_is_refused(tmp_path):
    layout = types_pb2.KvLayout(
        num_layers=9, page_size=16, dtype=types_pb2.CACHE_DTYPE_FLOAT32,
        latent=types_pb2.LatentLayout(kv_lora_rank=8, rope_dim=4),
    )  # fmt: skip

    async def test(router):
        for other in (scripted_worker("both", fingerprint="beef" * 16), scripted_worker("both", layout=layout)):
            await router.add(other)
        await router.wait_states(["ready", "refused", "refused"])
        details = sorted(status.detail for status in (await router.info()).workers)
        assert "cache layout" in details[1]
        assert details[2] == "its model is beefbeefbeef; this fleet serves fa4efa4efa4e"

    run_router(tmp_path, [scripted_worker("both")], test)


def test_one_process_at_two_addresses_is_one_worker(tmp_path):
    async def test(router):
        port = router.workers[0].address.rpartition(":")[2]
        (tmp_path / "workers").write_text(f"# twice\n127.0.0.1:{port}\nlocalhost:{port}\nnonsense\n")
        await router.wait_states(["ready", "refused"])

    run_router(tmp_path, [scripted_worker("both")], test)


def test_a_dns_name_stands_for_its_addresses(tmp_path, monkeypatch):
    answers = {"workers.example": ["127.0.0.1"]}

    def look_up(host, port, *_, **__):
        if host not in answers:
            raise OSError("no such name")
        return [(2, 1, 6, "", (address, port)) for address in answers[host]]

    async def test(router):
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        port = router.workers[0].address.rpartition(":")[2]
        (tmp_path / "workers").write_text(f"workers.example:{port}\n")
        await asyncio.sleep(0)
        await router.generate(text_request("a"))
        answers["workers.example"] = ["127.0.0.1", "127.0.0.2"]
        await router.wait_states(["ready", "unreachable"])
        answers.clear()
        await router.generate(text_request("a"))
        monkeypatch.undo()

    run_router(tmp_path, [scripted_worker("both")], test)


def test_a_key_is_asked_for_but_not_of_probes(tmp_path):
    keys, entries = make_keys("alice", "bob")
    (tmp_path / "keys.toml").write_text(entries)

    async def main():
        async with RouterUnderTest(tmp_path, settings={"keys_file": tmp_path / "keys.toml"}) as router:
            for metadata in (
                (),
                (("authorization", "Bearer wrong"),),
                (("authorization", keys["alice"]),),
                (("authorization", f"Bearer {keys['alice']}x"),),
                (("authorization", f"Bearer {keys['alice'].replace('alice', 'bob')}"),),
            ):
                for call in (
                    router.stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=metadata, timeout=WAIT_S),
                    router.stub.Generate(text_request("a"), metadata=metadata, timeout=WAIT_S).read(),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call
                    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
                    assert (rpc.REASON_KEY, "BAD_API_KEY") in tuple(caught.value.trailing_metadata())
            good = (("authorization", f"Bearer {keys['bob']}"),)
            assert (await router.stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=good)).model_name == "tiny"
            health = health_pb2_grpc.HealthStub(router.channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1

    asyncio.run(main())


def test_tls_serves_and_plain_text_is_refused(tmp_path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    curve = (
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    )
    command = ["openssl", "req", "-x509", *curve, "-keyout", key, "-out", cert, "-addext", names]
    subprocess.run(command, check=True, capture_output=True)

    async def main():
        async with RouterUnderTest(tmp_path, settings={"tls_cert": cert, "tls_key": key}) as router:
            tls = ChannelTls(grpc.ssl_channel_credentials(cert.read_bytes()))
            async with rpc.channel(router.address, tls=tls) as channel:
                info = await GenerationServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT_S)
                assert info.model_name == "tiny"
                # Who shows no certificate is a client: nobody asks for one here.
                reflection = channel.unary_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await reflection(b"", timeout=WAIT_S).read()
                assert rpc.raised_from(caught.value).reason == "WRONG_ROLE"
            with pytest.raises(grpc.aio.AioRpcError):
                await router.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT_S)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "kind", "reason"),
    [
        ({"model": "nowhere"}, CheckpointError, "NO_TOKENIZER"),
        ({"workers": "no-port"}, StartupError, "BAD_ADDRESS"),
        ({"tls_cert": "cert.pem"}, StartupError, "BAD_TLS"),
        ({"tls_cert": "cert.pem", "tls_key": "key.pem"}, StartupError, "BAD_TLS"),
        ({"tls": "nowhere"}, StartupError, "BAD_TLS"),
    ],
)
def test_settings_that_can_not_work_end_the_start(tmp_path, settings, kind, reason):
    async def main():
        options = {"model": write_tokenizer(tmp_path / "tiny"), "listen": "127.0.0.1:0", **settings}
        with pytest.raises(kind) as caught:
            await start_and_stop(RouterSettings(**options))
        assert caught.value.reason == reason

    asyncio.run(main())


async def start_and_stop(settings):
    service = RouterService(settings)
    try:
        await service.start()
    finally:
        await service.stop()


def test_draining_refuses_new_requests_and_ends_those_under_way(tmp_path):
    async def test(router):
        both = router.workers[0]
        both.faults.join_gate.clear()
        running = asyncio.create_task(router.generate(text_request("a", sampling={"max_tokens": 3})))
        await wait_until(lambda: len(both.starts) == 1)
        draining = asyncio.create_task(router.service.drain())
        await wait_until(lambda: router.service._router._is_draining)
        assert (await router.refused(text_request("a"))).reason == "DRAINING"
        assert not draining.done()
        both.faults.join_gate.set()
        assert (await running)[0].text == "Hel"
        await draining

    run_router(tmp_path, [scripted_worker("both")], test)


def test_stopping_ends_what_is_under_way_with_one_clear_error(tmp_path):
    async def main():
        async with RouterUnderTest(tmp_path, workers=[scripted_worker("both", step_s=None)]) as router:
            running = asyncio.create_task(router.generate(text_request("a")))
            await wait_until(lambda: bool(router.workers[0].sequences))
            await router.service.stop()
            with pytest.raises(UnavailableError):
                await running
            await wait_until(lambda: router.workers[0].is_empty)

    asyncio.run(main())


def test_a_reader_that_stops_holds_up_nobody(tmp_path):
    async def test(router):
        slow = router.stub.Generate(text_request("a", sampling={"max_tokens": 900}))
        await slow.read()
        for _ in range(3):
            await router.generate(text_request("b", sampling={"max_tokens": 50}))
        last = None
        while (response := await slow.read()) is not grpc.aio.EOF:
            last = response
        assert last.usage.num_output_tokens == 900

    run_router(tmp_path, [scripted_worker("both")], test)


def test_server_info_names_the_model_and_every_worker(tmp_path):
    async def test(router):
        info = await router.info()
        assert (info.model_name, info.max_context_tokens, len(info.workers)) == ("tiny", 1024, 2)
        assert {status.address for status in info.workers} == {each.address for each in router.workers}
        assert {status.num_free_pages for status in info.workers} == {256}

    run_router(tmp_path, [scripted_worker("prefill"), scripted_worker("decode")], test)


def test_the_router_never_loads_torch():
    code = "import sys, headrace_router.__main__, headrace_router.testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
