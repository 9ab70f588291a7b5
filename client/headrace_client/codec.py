"""Between the wire's messages and this client's values; shared by the blocking and the asyncio client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from headrace.v1 import generation_service_pb2 as pb
from headrace.v1 import types_pb2
from headrace_core.errors import InvalidRequestError, ProtocolError
from headrace_core.grpc_options import MAX_MESSAGE_BYTES
from headrace_core.request import (
    MAX_COUNT,
    MAX_SAMPLES,
    FinishReason,
    check_request_id,
)
from headrace_core.rpc import answered
from headrace_core.wire import decode_finish, encode_sampling, without_float32

from headrace_client.arguments import OF_THE_MODEL, prompt_of, sampling_of, service_level_of, text_of, whole
from headrace_client.results import (
    ChatMessage,
    Delta,
    Generation,
    Phase,
    Prompt,
    PromptTokenLogprobs,
    Sample,
    ServerInfo,
    Timings,
    TokenLogprobs,
    Usage,
    Worker,
)
from headrace_client.sampling import SamplingParams
from headrace_client.service_level import ServiceLevel

_ROLES: dict[types_pb2.WorkerRole.ValueType, str] = {
    types_pb2.WORKER_ROLE_PREFILL: "prefill",
    types_pb2.WORKER_ROLE_DECODE: "decode",
    types_pb2.WORKER_ROLE_BOTH: "both",
}


def encode_request(
    prompt: Prompt,
    sampling: SamplingParams | None,
    *,
    service_level: ServiceLevel | None = None,
    n: int,
    model: str,
    request_id: str,
    include_timings: bool,
) -> pb.GenerateRequest:
    """Return the message of what callers passed, whatever its types are.

    Raises:
        InvalidRequestError: what can be seen to be wrong without the model: EMPTY_PROMPT, PROMPT_TOO_LONG (for one
            message), BAD_TOKEN, BAD_SAMPLING, BAD_REQUEST (request id, `n`, service level,
            text that is not Unicode, another type).
    """
    (params, left), request_id = sampling_of(sampling), text_of("request_id", request_id)
    if request_id:
        check_request_id(request_id)
    n = whole("n", n)
    if not 1 <= n <= MAX_COUNT:
        raise InvalidRequestError("BAD_REQUEST", f"n is {n}; it must be at least 1, and a router takes {MAX_SAMPLES}")
    params.validate()
    request = pb.GenerateRequest(request_id=request_id, n=n, include_timings=bool(include_timings))
    try:
        request.model = text_of("model", model)
        _set_level(request, service_level)
        request.sampling.CopyFrom(encode_sampling(params))
    except UnicodeEncodeError:
        raise InvalidRequestError("BAD_REQUEST", "model, slo_class or stop_strings is not valid Unicode text") from None
    except ValueError as error:
        raise InvalidRequestError("BAD_SAMPLING", f"a sampling parameter does not fit the wire: {error}") from None
    for name in left:
        request.sampling.ClearField(name)  # pyright: ignore[reportArgumentType]
    _set_prompt(request, prompt)
    size_bytes = request.ByteSize()
    if size_bytes > MAX_MESSAGE_BYTES:
        raise InvalidRequestError(
            "PROMPT_TOO_LONG",
            f"the request is {size_bytes / 2**20:.1f} MiB; a router takes at most {MAX_MESSAGE_BYTES >> 20} MiB",
        )
    return request


def _set_level(request: pb.GenerateRequest, service_level: ServiceLevel | None) -> None:
    level = service_level_of(service_level)
    request.priority = level.priority
    if level.slo_class:
        request.service_level.slo_class = level.slo_class
    if level.ttft_ms is not None:
        request.service_level.ttft_ms = level.ttft_ms
    if level.itl_ms is not None:
        request.service_level.itl_ms = level.itl_ms


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    given = prompt_of(prompt)
    try:
        if isinstance(given, str):
            request.text.text = given
            return
        messages = [part for part in given if isinstance(part, ChatMessage)]
        if messages:
            chat = [pb.ChatMessage(role=message.role, content=message.content) for message in messages]
            request.chat.messages.extend(chat)
        else:
            request.tokens.token_ids.extend(part for part in given if isinstance(part, int))
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            "BAD_REQUEST", f"the prompt is not valid Unicode text at character {error.start}"
        ) from None
    except ValueError as error:
        raise InvalidRequestError("BAD_TOKEN", f"a token id does not fit the wire: {error}") from None


class Reader:
    """Turns one request's responses into deltas and checks that each sample comes to its end."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request_id = request.request_id
        self._unfinished = set(range(request.n))

    def read(self, response: pb.GenerateResponse) -> Delta:
        """Return the delta.

        Raises:
            ProtocolError: PROTOCOL, the router sent what this client does not understand.
        """
        response = answered(response)
        self._request_id = response.request_id or self._request_id
        delta = Delta(
            request_id=self._request_id,
            sample_index=response.sample_index,
            text=response.text,
            token_ids=tuple(response.token_ids),
            logprobs=tuple(_decode_logprobs(entry) for entry in response.logprobs),
            finish_reason=decode_finish(response.finish_reason),
            usage=_decode_usage(response.usage) if response.HasField("usage") else None,
            timings=_decode_timings(response.timings) if response.HasField("timings") else None,
            matched_stop_string=response.matched_stop_string,
            prompt_logprobs=_decode_prompt(response.prompt_logprobs) if response.HasField("prompt_logprobs") else (),
        )
        if delta.sample_index not in self._unfinished:
            raise ProtocolError(
                "PROTOCOL", f"the router sent more of sample {delta.sample_index}, which is no open one"
            )
        if delta.finish_reason:
            self._unfinished.remove(delta.sample_index)
        return delta

    def end(self) -> None:
        """Check that nothing is missing where the stream ends.

        Raises:
            ProtocolError: PROTOCOL, a sample did not come to its end.
        """
        if self._unfinished:
            raise ProtocolError("PROTOCOL", f"the router's answer ended before samples {sorted(self._unfinished)} did")


class Collector:
    """Puts deltas together again."""

    def __init__(self) -> None:
        self._request_id = ""
        self._deltas: dict[int, list[Delta]] = {}

    def add(self, delta: Delta) -> None:
        """Take the next delta."""
        self._request_id = delta.request_id
        self._deltas.setdefault(delta.sample_index, []).append(delta)

    def generation(self) -> Generation:
        """Return everything taken; call it when the stream has ended well."""
        return Generation(self._request_id, tuple(_sample(self._deltas[index]) for index in sorted(self._deltas)))


def collect(deltas: Iterable[Delta]) -> Generation:
    """Return the whole that the deltas of an ended stream make."""
    collector = Collector()
    for delta in deltas:
        collector.add(delta)
    return collector.generation()


def _sample(deltas: list[Delta]) -> Sample:
    last = deltas[-1]
    logprobs: list[TokenLogprobs] = [entry for delta in deltas for entry in delta.logprobs]
    return Sample(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        finish_reason=last.finish_reason or FinishReason.LENGTH,
        usage=last.usage or Usage(0, 0, 0),
        logprobs=tuple(logprobs),
        timings=last.timings,
        matched_stop_string=last.matched_stop_string,
        prompt_logprobs=tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
    )


def _decode_logprobs(entry: types_pb2.TokenLogprobs) -> TokenLogprobs:
    top = tuple((each.token_id, each.logprob) for each in entry.top)
    return TokenLogprobs(entry.logprob, top, entry.token, tuple(each.token for each in entry.top))


def _decode_prompt(said: types_pb2.PromptLogprobs) -> tuple[PromptTokenLogprobs, ...]:
    count = len(said.logprobs)
    num_top = len(said.top_token_ids) // count if count else 0
    columns = (said.ranks, said.token_ids, said.tokens)
    tops = (said.top_logprobs, said.top_tokens)
    if any(len(each) != count for each in columns) or any(len(each) != num_top * count for each in tops):
        raise ProtocolError("PROTOCOL", "the router sent log-probabilities of a prompt with parts missing")
    pairs = list(zip(said.top_token_ids, said.top_logprobs, strict=False))
    return tuple(
        PromptTokenLogprobs(
            said.token_ids[i],
            said.ranks[i],
            TokenLogprobs(
                said.logprobs[i],
                tuple(pairs[i * num_top : (i + 1) * num_top]),
                said.tokens[i],
                tuple(said.top_tokens[i * num_top : (i + 1) * num_top]),
            ),
        )
        for i in range(count)
    )


def _decode_usage(usage: pb.Usage) -> Usage:
    return Usage(usage.num_prompt_tokens, usage.num_output_tokens, usage.num_cached_tokens)


def _decode_timings(timings: pb.Timings) -> Timings:
    return Timings(
        phases=tuple(Phase(phase.name, phase.duration_us, phase.is_before_first_token) for phase in timings.phases),
        total_us=timings.total_us,
        ttft_us=timings.ttft_us,
        transfer_bytes=timings.transfer_bytes,
        num_transfer_pages=timings.num_transfer_pages,
        transport=timings.transport,
        num_attempts=timings.num_attempts,
        prefill_worker=timings.prefill_worker,
        decode_worker=timings.decode_worker,
        hidden_transfer_us=timings.hidden_transfer_us,
        hidden_transfer_bytes=timings.hidden_transfer_bytes,
    )


def decode_server_info(info: pb.GetServerInfoResponse) -> ServerInfo:
    """Return the value.

    Raises:
        ProtocolError: PROTOCOL, the router's answer is no message.
    """
    info = answered(info)
    return ServerInfo(
        model_name=info.model_name,
        model_fingerprint=info.model_fingerprint,
        max_context_tokens=info.max_context_tokens,
        workers=tuple(_decode_worker(worker) for worker in info.workers),
        num_queued=info.num_queued,
        num_running=info.num_running,
        version=info.version,
        metrics_port=info.metrics_port,
        default_sampling=_decode_default_sampling(info.default_sampling),
    )


def _decode_default_sampling(message: types_pb2.SamplingParams) -> dict[str, float]:
    known = (name for name in OF_THE_MODEL if message.HasField(name))  # pyright: ignore[reportArgumentType]
    return {name: without_float32(getattr(message, name)) for name in known}


def _decode_worker(worker: Any) -> Worker:
    return Worker(
        address=worker.address,
        role=_ROLES.get(worker.role, ""),
        state=worker.state,
        detail=worker.detail,
        num_pages=worker.num_pages,
        num_free_pages=worker.num_free_pages,
        num_running=worker.num_running,
        num_waiting=worker.num_waiting,
        num_leases=worker.num_leases,
        transports=tuple(worker.transports),
        transport_in_use=worker.transport_in_use,
        transfer_bytes_per_s=worker.transfer_bytes_per_s,
        metrics_port=worker.metrics_port,
        circuit=worker.circuit or "closed",
    )
