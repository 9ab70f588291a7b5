"""Both clients against a scripted router over real gRPC."""

import asyncio
import subprocess
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from headrace.v1 import generation_service_pb2 as pb
from headrace_client import (
    AsyncClient,
    ChatMessage,
    Client,
    ConnectionOptions,
    DeadlineError,
    FinishReason,
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RetryPolicy,
    SamplingParams,
    ServiceLevel,
    UnavailableError,
)
from headrace_core.testing.async_test import WAIT_S
from headrace_core.testing.fake_router import FakeRouter, Hold, answer

AT_ONCE = ConnectionOptions(retry=RetryPolicy(max_attempts=3, first_pause_s=0.0))
NOBODY = "127.0.0.1:1"
"""An address at which nothing serves: a port that a server left may be another's by now."""
FULL = OverloadedError("QUEUE_FULL", "1024 requests are waiting")
FORWARDED_CANCEL = (grpc.StatusCode.CANCELLED, "Locally cancelled by application!")
"""What a proxy in Python hands on when its own call was cancelled: grpc's words for a cancel on this side."""


def run_blocking(router: FakeRouter, *args, options: ConnectionOptions = AT_ONCE, **kwargs):
    with Client(router.address, options) as client:
        return client.generate(*args, **kwargs)


def run_asyncio(router: FakeRouter, *args, options: ConnectionOptions = AT_ONCE, **kwargs):
    async def run():
        async with AsyncClient(router.address, options) as client:
            return await client.generate(*args, **kwargs)

    return asyncio.run(run())


@pytest.fixture(params=[run_blocking, run_asyncio], ids=["blocking", "asyncio"])
def generate(request):
    return request.param


def test_the_whole_answer_comes_back(generate):
    with FakeRouter([*answer("Once", " upon", " a")]) as router:
        result = generate(router, "Tell", SamplingParams(temperature=0.7, seed=3), include_timings=True)
    assert result.text == "Once upon a"
    assert result.token_ids == (100, 101, 102)
    assert [entry.logprob for entry in result.logprobs] == [-0.5, -1.0, -1.5]
    assert result.logprobs[0].top == ((7, -0.25),)
    assert [(entry.token, entry.top_tokens) for entry in result.logprobs] == [
        (token, (b" likelier",)) for token in (b"Once", b" upon", b" a")
    ]
    assert result.finish_reason is FinishReason.STOP
    assert (result.usage.num_prompt_tokens, result.usage.num_output_tokens, result.usage.num_cached_tokens) == (3, 3, 1)
    assert result.request_id == "fake-1"
    sent = router.requests[0]
    assert (sent.text.text, sent.sampling.seed, sent.include_timings, sent.n) == ("Tell", 3, True, 1)
    assert sent.sampling.temperature == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("level", "sent"),
    [
        (None, None),
        (ServiceLevel(), None),
        (ServiceLevel("interactive"), pb.ServiceLevel(slo_class="interactive")),
        (ServiceLevel(ttft_ms=800, itl_ms=0), pb.ServiceLevel(ttft_ms=800, itl_ms=0)),
    ],
)
def test_the_router_is_told_how_soon_tokens_should_come(generate, level, sent):
    with FakeRouter() as router:
        generate(router, "Tell", service_level=level)
    (request,) = router.requests
    assert (request.service_level if request.HasField("service_level") else None) == sent


def test_the_router_is_told_which_requests_start_first(generate):
    with FakeRouter() as router:
        generate(router, "Tell", service_level=ServiceLevel(priority=-7))
        generate(router, "Tell")
    assert [request.priority for request in router.requests] == [-7, 0]


def test_timings_keep_every_phase_and_sum_to_the_whole(generate):
    with FakeRouter() as router:
        timings = generate(router, "Tell", include_timings=True).timings
    assert sum(phase.duration_us for phase in timings.phases) == timings.total_us == 100_000
    assert sum(p.duration_us for p in timings.phases if p.is_before_first_token) == timings.ttft_us
    assert (timings.transport, timings.num_transfer_pages, timings.transfer_bytes) == ("grpc", 2, 655_360)
    assert (timings.hidden_transfer_us, timings.hidden_transfer_bytes) == (6_000, 491_520), "beside the sum"


def test_samples_that_come_interleaved_are_put_together(generate):
    first, second = list(answer("a", "b")), list(answer("x", "y", "z", sample_index=1))
    with FakeRouter([second[0], first[0], second[1], first[1], second[2]]) as router:
        result = generate(router, "Tell", n=2)
    assert [sample.text for sample in result.samples] == ["ab", "xyz"]
    assert result.text == "ab"


def test_token_ids_and_conversations_travel_as_such(generate):
    with FakeRouter() as router:
        generate(router, [1, 2, 3])
        generate(router, [ChatMessage("system", "Be brief."), ChatMessage("user", "Hi")])
    assert list(router.requests[0].tokens.token_ids) == [1, 2, 3]
    assert [(message.role, message.content) for message in router.requests[1].chat.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]


@pytest.mark.parametrize(
    "failure",
    [
        FULL,
        UnavailableError("DRAINING", "bye"),
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        FORWARDED_CANCEL,
    ],
)
def test_a_passing_failure_before_the_first_token_is_retried(generate, failure):
    with FakeRouter([failure], [failure], [*answer("a", "b")]) as router:
        assert generate(router, "Tell").text == "ab"
    assert len(router.requests) == 3


def test_retries_are_bounded(generate):
    with FakeRouter([FULL]) as router, pytest.raises(OverloadedError, match="1024") as caught:
        generate(router, "Tell")
    assert (len(router.requests), caught.value.reason) == (3, "QUEUE_FULL")


@pytest.mark.parametrize("failure", [FULL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, FORWARDED_CANCEL])
def test_nothing_is_retried_after_the_first_token(generate, failure):
    script = [next(answer("a", "b")), failure]
    with FakeRouter(script, [*answer("wrong", " again")]) as router, pytest.raises(HeadraceError) as caught:
        generate(router, "Tell")
    assert len(router.requests) == 1
    assert caught.value.reason in ("QUEUE_FULL", "CONNECTION_LOST")


@pytest.mark.parametrize(
    "error", [InvalidRequestError("BAD_SAMPLING", "top_p is 3"), NotFoundError("UNKNOWN_MODEL", "no such model")]
)
def test_a_refusal_is_raised_as_itself_and_not_retried(generate, error):
    with FakeRouter([error]) as router, pytest.raises(type(error), match=str(error)) as caught:
        generate(router, "Tell")
    assert (len(router.requests), caught.value.reason) == (1, error.reason)


def test_a_request_too_large_for_grpc_is_no_passing_failure(generate, monkeypatch):
    monkeypatch.setattr("headrace_client.codec.MAX_MESSAGE_BYTES", 1 << 30)
    options = [("grpc.max_send_message_length", -1)]
    monkeypatch.setattr("headrace_core.rpc.CHANNEL_OPTIONS", options)
    with FakeRouter() as router, pytest.raises(InvalidRequestError) as caught:
        generate(router, "x" * (9 << 20))
    assert (caught.value.reason, router.requests) == ("PROMPT_TOO_LONG", [])


def test_the_deadline_ends_the_call_and_reaches_the_router(generate):
    with FakeRouter([Hold.UNTIL_CANCELLED]) as router:
        timeout_s = 0.2
        while not router.requests:  # a call may need longer than its limit to get there
            with pytest.raises(DeadlineError, match="time limit"):
                generate(router, "Tell", timeout_s=timeout_s)
            timeout_s *= 2
        assert router.cancelled.wait(WAIT_S)


def test_an_answer_that_stops_short_is_an_error(generate):
    with FakeRouter([next(answer("a", "b"))]) as router, pytest.raises(HeadraceError) as caught:
        generate(router, "Tell")
    assert caught.value.reason == "PROTOCOL"


def test_a_sample_nobody_asked_for_is_an_error(generate):
    with FakeRouter([*answer("a", sample_index=1)]) as router, pytest.raises(HeadraceError, match="sample 1") as caught:
        generate(router, "Tell")
    assert caught.value.reason == "PROTOCOL"


def test_a_router_that_is_not_there_says_where_it_should_be(generate):
    with pytest.raises(UnavailableError, match=NOBODY) as caught:
        generate(SimpleNamespace(address=NOBODY), "Tell")
    assert caught.value.reason == "UNREACHABLE"


def test_a_token_is_sent_and_a_wrong_one_refused(generate):
    with FakeRouter(token="open sesame") as router:
        assert generate(router, "Tell", options=ConnectionOptions(api_key="open sesame")).text == "A story."
        with pytest.raises(HeadraceError) as caught:
            generate(router, "Tell", options=ConnectionOptions(api_key="open barley"))
    assert caught.value.reason == "BAD_API_KEY"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A folder with a self-signed certificate for this machine."""
    folder = tmp_path_factory.mktemp("certificate")
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=headrace"
    files = ["-addext", names, "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True, timeout=WAIT_S)
    return folder


def test_tls_is_checked_against_the_given_roots(generate, certificate):
    pair = ((certificate / "key.pem").read_bytes(), (certificate / "cert.pem").read_bytes())
    trusting = ConnectionOptions(root_certificates=certificate / "cert.pem")
    not_trusting = ConnectionOptions(use_tls=True, retry=RetryPolicy(max_attempts=1))
    with FakeRouter(credentials=grpc.ssl_server_credentials([pair])) as router:
        assert generate(router, "Tell", options=trusting).text == "A story."
        with pytest.raises(UnavailableError) as caught:
            generate(router, "Tell", options=not_trusting)
    assert caught.value.reason == "UNREACHABLE"
    assert len(router.requests) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"prompt": ""}, "EMPTY_PROMPT"),
        ({"prompt": []}, "EMPTY_PROMPT"),
        ({"prompt": "x" * (9 << 20)}, "PROMPT_TOO_LONG"),
        ({"prompt": "caf\udce9"}, "BAD_REQUEST"),
        ({"prompt": [1, -1]}, "BAD_TOKEN"),
        ({"prompt": [1, ChatMessage("user", "Hi")]}, "BAD_REQUEST"),
        ({"prompt": "Tell", "sampling": SamplingParams(top_p=3.0)}, "BAD_SAMPLING"),
        ({"prompt": "Tell", "sampling": SamplingParams(max_tokens=1 << 40)}, "BAD_SAMPLING"),
        ({"prompt": "Tell", "request_id": "no spaces"}, "BAD_REQUEST"),
        ({"prompt": "Tell", "n": 0}, "BAD_REQUEST"),
    ],
)
def test_what_can_never_succeed_is_refused_before_it_is_sent(generate, arguments, reason):
    with FakeRouter() as router, pytest.raises(InvalidRequestError) as caught:
        generate(router, **arguments)
    assert (caught.value.reason, router.requests) == (reason, [])


def test_server_info_lists_the_workers():
    with FakeRouter() as router, Client(router.address) as client:
        info = client.server_info()
    assert (info.model_name, info.max_context_tokens, info.num_running) == ("fake-model", 4096, 1)
    ready, _, lost = info.workers
    assert (ready.role, ready.state, ready.num_free_pages, ready.transports) == ("prefill", "ready", 100, ("grpc",))
    assert (lost.role, lost.state, lost.detail) == ("", "unreachable", "connection refused")


def test_server_info_of_an_asyncio_client_is_the_same():
    async def run(address: str):
        async with AsyncClient(address) as client:
            return await client.server_info()

    with FakeRouter() as router, Client(router.address) as client:
        assert asyncio.run(run(router.address)) == client.server_info()


def test_server_info_retries_and_then_raises():
    draining = UnavailableError("DRAINING", "bye")
    with (
        FakeRouter(infos=[draining]) as router,
        Client(router.address, AT_ONCE) as client,
        pytest.raises(UnavailableError, match="bye"),
    ):
        client.server_info()


def test_an_unreadable_root_certificate_is_named(tmp_path):
    with pytest.raises(InvalidRequestError, match="No such file"):
        Client("127.0.0.1:1", ConnectionOptions(root_certificates=tmp_path / "none.pem"))
    (tmp_path / "empty.pem").write_text("nothing")
    with pytest.raises(InvalidRequestError, match="no PEM"):
        Client("127.0.0.1:1", ConnectionOptions(root_certificates=tmp_path / "empty.pem"))


def test_a_token_that_no_header_can_carry_is_refused():
    with (
        Client("127.0.0.1:1", ConnectionOptions(api_key="a\nb")) as client,
        pytest.raises(InvalidRequestError, match="API key"),
    ):
        client.generate("Tell")


def test_an_unknown_finish_reason_is_an_error(generate):
    response = next(answer("a"))
    response.finish_reason = 99
    with FakeRouter([response]) as router, pytest.raises(HeadraceError, match="99"):
        generate(router, "Tell")
    assert isinstance(router.requests[0], pb.GenerateRequest)
