"""One trace of each request across real processes, sent to a real collector: parents, times, errors, attempts."""

from __future__ import annotations

import asyncio
import itertools
import signal
import urllib.request

import pytest
from headrace_client import AsyncClient, Client
from headrace_client.cluster.local_cluster import LocalCluster
from headrace_core.errors import NotFoundError
from headrace_core.request import SamplingParams
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.cluster_checks import eventually
from headrace_core.testing.otlp_collector import OtlpCollector
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.openmetrics.parser import text_string_to_metric_families

PROMPT = "Once upon a time there was a little fox named Zorvim. The fox lived in the forest with a bear." * 8
OPTIONS = {"dtype": "float32", "page-size": 16, "kv-pool-mib": 8, "max-step-tokens": 96, "trace-sample": 0}
APP = TracerProvider().get_tracer("an application's own")

CLOCK_US = 1000
"""Processes read the wall clock each for itself, between two instructions; an interruption there is a difference."""

PARENTS = {
    "tokenize": "text_completion model",
    "attempt": "text_completion model",
    **dict.fromkeys(
        (
            "queue",
            "decode_queue",
            "prefill_queue",
            "prefill",
            "prefill_hop",
            "transfer",
            "join",
            "first_step",
            "decode",
        ),
        "attempt",
    ),
    "sequence": "attempt",
    "waiting": "sequence",
    "hand_off": "sequence",
    "joining": "sequence",
    "running": "sequence",
    "lease": "hand_off",
    "computing": "lease",
    "held": "lease",
}
"""What a request that is handed off has; the prefill worker's `waiting` is as the decode worker's."""


@pytest.fixture(scope="module")
def collector():
    with OtlpCollector() as collector:
        yield collector


@pytest.fixture(scope="module")
def cluster(model_dir, collector):
    with LocalCluster(
        model_dir,
        num_prefill=1,
        num_decode=2,
        router_options={"trace-sample": 0},
        worker_options=OPTIONS,
        env=collector.environment,
    ) as cluster:
        yield cluster


def params(num_tokens):
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def in_trace(spans, trace_id):
    return [span for span in spans if span.trace_id == trace_id]


def wait_trace(collector, trace_id, num_leases=1, num_sequences=1):
    """Return a trace's spans when the request and what it had at workers are among them."""

    def is_there(spans):
        names = [span.name for span in in_trace(spans, trace_id)]
        at_workers = (names.count("lease"), names.count("sequence"))
        return "text_completion model" in names and at_workers >= (num_leases, num_sequences)

    return in_trace(collector.wait(is_there, f"a whole trace {trace_id}"), trace_id)


def test_a_request_is_one_trace_whose_spans_lie_in_each_other_and_sum_to_its_waterfall(cluster, collector):
    with Client(cluster.router_address) as client, APP.start_as_current_span("app") as app:
        result = client.generate(PROMPT, params(24), include_timings=True)
    context = app.get_span_context()
    spans = wait_trace(collector, trace.format_trace_id(context.trace_id))
    by_id = {span.span_id: span for span in spans}
    (request,) = (span for span in spans if span.parent_id not in by_id)
    assert request.parent_id == trace.format_span_id(context.span_id)

    assert {span.service for span in spans} == {"headrace-router", "headrace-prefill", "headrace-decode"}
    assert {span.name for span in spans} == {request.name, *PARENTS}
    for span in spans:
        if span is not request:
            parent = by_id[span.parent_id]
            expected = "lease" if span.service == "headrace-prefill" and span.name == "waiting" else PARENTS[span.name]
            assert parent.name == expected, span
            assert parent.start_ns - 1000 * CLOCK_US <= span.start_ns, span
            assert span.end_ns <= parent.end_ns + 1000 * CLOCK_US, span

    phases = sorted((s for s in spans if s.service == "headrace-router" and s.name not in (request.name, "attempt")),
                    key=lambda span: (span.start_ns, span.end_ns))  # fmt: skip
    assert [(span.name, span.duration_us) for span in phases] == [
        (phase.name, phase.duration_us) for phase in result.timings.phases
    ]
    assert phases[0].start_ns == request.start_ns
    assert all(one.end_ns == other.start_ns for one, other in itertools.pairwise(phases))

    told = request.attributes
    assert told["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.request.model"] == "model"
    assert told["gen_ai.usage.input_tokens"] == result.usage.num_prompt_tokens
    assert told["gen_ai.usage.output_tokens"] == 24
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert told["gen_ai.server.time_to_first_token"] == pytest.approx(result.timings.ttft_us / 1e6, abs=2e-6)
    (lease,) = (span for span in spans if span.name == "lease")
    assert lease.attributes["headrace.bytes"] == result.timings.transfer_bytes > 0
    assert not any(PROMPT[:8] in str(span) for span in spans)


def test_a_request_of_a_client_without_a_trace_has_none_where_none_is_sampled(cluster, collector):
    with Client(cluster.router_address) as client:
        client.generate(PROMPT, params(2))
        with APP.start_as_current_span("later") as app:
            client.generate(PROMPT, params(2))
    wait_trace(collector, trace.format_trace_id(app.get_span_context().trace_id))
    requests = [span for span in collector.spans if span.name == "text_completion model"]
    assert all(span.parent_id for span in requests)


def test_a_refusal_is_the_error_of_its_span(cluster, collector):
    with (
        Client(cluster.router_address) as client,
        APP.start_as_current_span("app") as app,
        pytest.raises(NotFoundError),
    ):
        client.generate(PROMPT, params(2), model="another")
    trace_id = trace.format_trace_id(app.get_span_context().trace_id)
    (span,) = in_trace(collector.wait(lambda spans: in_trace(spans, trace_id), "the refusal"), trace_id)
    assert span.error == "UNKNOWN_MODEL"
    assert span.attributes["error.type"] == "UNKNOWN_MODEL"


def test_histograms_name_traces_as_examples(cluster, collector):
    with Client(cluster.router_address) as client, APP.start_as_current_span("app") as app:
        client.generate(PROMPT, params(8))
    trace_id = trace.format_trace_id(app.get_span_context().trace_id)
    request = urllib.request.Request(
        f"http://{cluster.router.metrics_address}/metrics",
        headers={"Accept": "application/openmetrics-text; version=1.0.0"},
    )
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    named = {
        family.name
        for family in families
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels == {"trace_id": trace_id}
    }
    assert named == {"headrace_ttft_seconds", "headrace_itl_seconds", "headrace_e2e_seconds"}


def test_an_attempt_that_lost_its_worker_and_the_next_one_are_linked(cluster, collector):
    async def generate():
        async with AsyncClient(cluster.router_address) as client:
            with APP.start_as_current_span("app") as app:
                stream = client.stream(PROMPT, params(400), include_timings=True)
            seen, last = 0, None
            async for delta in stream:
                seen, last = seen + len(delta.token_ids), delta
                if seen >= 8:
                    break

            async def running():
                workers = (await client.server_info()).workers
                return [worker.address for worker in workers if worker.num_running and worker.role == "decode"]

            (address,) = await eventually(running, what="a decode worker says that it runs something")
            (process,) = (process for process in cluster.workers if process.address == address)
            process.send_signal(signal.SIGKILL)
            async for delta in stream:
                seen, last = seen + len(delta.token_ids), delta
            assert seen == 400
            return app.get_span_context(), last.timings

    context, timings = asyncio.run(generate())
    trace_id = trace.format_trace_id(context.trace_id)
    # What the killed worker would have sent died with it, so what is below its sequence has no parent here.
    spans = wait_trace(collector, trace_id, num_leases=2)
    first, second = sorted((s for s in spans if s.name == "attempt"), key=lambda span: span.start_ns)
    assert first.error == "WORKER_LOST"
    assert second.error == ""
    assert second.links == [first.span_id]
    assert first.attributes["headrace.decode_worker"] != second.attributes["headrace.decode_worker"]
    (request,) = (span for span in spans if span.name == "text_completion model")
    assert request.error == ""
    assert [name for name, _ in request.events] == ["attempt failed"]
    phases = [s for s in spans if s.service == "headrace-router" and s.name not in (request.name, "attempt")]
    assert sum(span.duration_us for span in phases) == timings.total_us
    assert [s.parent_id for s in spans if s.name == "retry"] == [first.span_id]
    assert [s.parent_id for s in spans if s.name == "sequence"] == [second.span_id]
