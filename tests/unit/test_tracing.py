"""What records spans and sends them: off at no cost, whose trace is followed, and a collector that nobody waits for."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest
from headrace_core.errors import StartupError
from headrace_core.testing.async_test import WAIT_S, async_test
from headrace_core.testing.otlp_collector import OtlpCollector
from headrace_core.tracing.span import NOT_TRACED, Tracer
from headrace_core.tracing.stages import Stages
from headrace_core.tracing.start import open_tracer

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01"
NOT_SAMPLED = f"00-{TRACE}-b7ad6b7169203331-00"

OFF = """
import asyncio, sys
from pathlib import Path
import headrace_client.commands.app
from headrace_client.connection import ConnectionOptions
from headrace_core.config import DecodeSettings, PrefillSettings
from headrace_decode.service import DecodeService
from headrace_prefill.service import PrefillService
from headrace_router.testing import run_router, scripted_worker, text_request

async def test(router):
    (sample,) = await router.generate(text_request("a", sampling={"max_tokens": 3}), traceparent=sys.argv[2])
    assert sample.text == "Hel"
    assert ConnectionOptions().metadata() == ()
    DecodeService(DecodeSettings(model="none"))
    PrefillService(PrefillSettings(model="none"))

run_router(Path(sys.argv[1]), [scripted_worker("prefill"), scripted_worker("decode")], test)
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""


@pytest.fixture
def collector(monkeypatch):
    with OtlpCollector() as collector:
        for name, value in collector.environment.items():
            monkeypatch.setenv(name, value)
        yield collector


def end_some(tracer, count, name="call"):
    for _ in range(count):
        tracer.begin(name, (), start_s=time.monotonic()).end()


def test_a_process_that_does_not_trace_loads_nothing_of_opentelemetry(tmp_path):
    command = [sys.executable, "-c", OFF, str(tmp_path), SAMPLED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_without_a_trace_every_span_is_the_one_that_does_nothing():
    tracer = open_tracer(None, "router")
    assert type(tracer) is Tracer
    span = tracer.begin("call", [("traceparent", SAMPLED)], start_s=0.0)
    stages = Stages(tracer.join("sequence", SAMPLED), "waiting")
    stages.next("running")
    stages.end("WORKER_LOST")
    assert span is span.child("part") is stages.span is NOT_TRACED
    assert (span.traceparent, span.trace_id, stages.traceparent) == ("", "", "")


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "headrace_core.tracing.otel", None)
    with pytest.raises(StartupError, match=r"pip install 'headrace\[tracing\]'") as caught:
        open_tracer(1.0, "router")
    assert caught.value.reason == "NO_OPENTELEMETRY"


def test_variables_that_cannot_be_are_refused_at_the_start(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")
    with pytest.raises(StartupError, match="soon") as caught:
        open_tracer(1.0, "router")
    assert caught.value.reason == "BAD_TRACING"


@async_test
async def test_a_callers_choice_is_followed_and_others_are_sampled_by_share(collector):
    always, never = open_tracer(1.0, "router"), open_tracer(0.0, "router")
    for tracer in (always, never):
        followed = tracer.begin("call", [("traceparent", SAMPLED), ("x-bin", b"\0")], start_s=time.monotonic())
        assert followed.trace_id == TRACE
        assert tracer.begin("call", [("traceparent", NOT_SAMPLED)], start_s=0.0) is NOT_TRACED
    for metadata in ((), [("traceparent", "00-nonsense")]):
        assert never.begin("call", metadata, start_s=0.0) is NOT_TRACED
        assert always.begin("call", metadata, start_s=0.0).trace_id not in ("", TRACE)
    await always.close()
    await never.close()


@async_test
async def test_a_worker_joins_traces_that_are_sampled_and_begins_none(collector):
    for share in (0.0, 1.0):
        tracer = open_tracer(share, "decode")
        assert tracer.join("sequence", SAMPLED).traceparent.startswith(f"00-{TRACE}-")
        for other in ("", NOT_SAMPLED, "nonsense", SAMPLED + "0", "\N{LATIN SMALL LETTER E WITH ACUTE}" * 55):
            assert tracer.join("sequence", other) is NOT_TRACED
        await tracer.close()


@async_test
async def test_what_is_left_is_sent_at_the_end(collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    tracer = open_tracer(1.0, "router")
    stages = Stages(tracer.begin("call", (), start_s=time.monotonic()), "waiting")
    stages.next("running")
    stages.event("first_token")
    stages.end("WORKER_LOST", {"headrace.attempt": 2})
    await tracer.close()
    waiting, running, call = collector.spans
    assert [span.name for span in (waiting, running, call)] == ["waiting", "running", "call"]
    assert waiting.parent_id == running.parent_id == call.span_id
    assert (waiting.error, running.error, call.error) == ("", "WORKER_LOST", "WORKER_LOST")
    assert (running.events, call.attributes["headrace.attempt"]) == ([("first_token", {})], 2)
    assert call.service == "headrace-router"


@pytest.mark.parametrize("host", ["", "localhost", "[::1]", "collector.example"])
def test_no_proxy_stands_before_a_collector_on_this_machine(monkeypatch, host):
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    given = []

    class Exporter(OTLPSpanExporter):
        def __init__(self, channel_options=None):
            given.append(channel_options)
            super().__init__(channel_options=channel_options)

    monkeypatch.setattr("headrace_core.tracing.otel.OTLPSpanExporter", Exporter)
    for endpoint in (f"http://{host}:4317", f"{host}:4317") if host else ("",):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        asyncio.run(open_tracer(1.0, "router").close())
    assert set(given) == {None if host == "collector.example" else (("grpc.enable_http_proxy", 0),)}


@async_test
async def test_the_variables_name_a_service_if_they_do(collector, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "front door")
    tracer = open_tracer(1.0, "router")
    end_some(tracer, 1)
    await tracer.close()
    assert [span.service for span in collector.spans] == ["front door"]


@async_test
async def test_an_end_does_not_wait_for_a_collector_that_does_not_answer(collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
    collector.may_answer.clear()
    tracer = open_tracer(1.0, "router")
    end_some(tracer, 1)
    async with asyncio.timeout(WAIT_S):
        await tracer.close()
    assert any(thread.name == "last spans" for thread in threading.enumerate()), "the SDK itself still waits"
    assert not collector.spans


@async_test
async def test_what_a_slow_collector_does_not_take_is_dropped(collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    collector.may_answer.clear()
    tracer = open_tracer(1.0, "router")
    end_some(tracer, 8, "first")
    await asyncio.to_thread(collector.wait, lambda _: collector.num_calls == 1, "the first batch is on its way")
    end_some(tracer, 1000, "more")
    collector.may_answer.set()
    await asyncio.to_thread(collector.wait, lambda spans: len(spans) == 24, "the batch and what the queue holds")
    await tracer.close()
    assert len(collector.spans) == 24
