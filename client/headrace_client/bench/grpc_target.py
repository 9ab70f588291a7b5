"""A router, asked over gRPC. Nothing is sent again: what is measured is one try."""

from __future__ import annotations

from typing import Any

import grpc
from headrace.v1.generation_service_pb2_grpc import GenerationServiceStub
from headrace_core.rpc import channel

from headrace_client.bench.target import Answered, OnTokens, Prompt
from headrace_client.codec import encode_request
from headrace_client.connection import Connection, ConnectionOptions
from headrace_client.sampling import SamplingParams


class GrpcTarget:
    """A `Target`. All requests share one connection, as those of a client do."""

    def __init__(self, address: str, options: ConnectionOptions, *, model: str, timeout_s: float) -> None:
        self._connection = Connection(address, options)
        self._channel = channel(address, tls=options.tls(), by_proxy=True)
        self._stub: Any = GenerationServiceStub(self._channel)
        self._model = model
        self._timeout_s = timeout_s

    async def ask(self, prompt: Prompt, num_output: int, on_tokens: OnTokens) -> Answered:
        """See `Target`."""
        sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
        request = encode_request(prompt, sampling, n=1, model=self._model, request_id="", include_timings=False)
        answered = Answered()
        metadata = self._connection.options.metadata()
        try:
            async for response in self._stub.Generate(request, timeout=self._timeout_s, metadata=metadata):
                token_ids = response.token_ids
                if token_ids:
                    on_tokens(len(token_ids))
                    answered.token_ids.extend(token_ids)
                if response.HasField("usage"):
                    usage = response.usage
                    answered.num_prompt, answered.num_output = usage.num_prompt_tokens, usage.num_output_tokens
                    answered.num_cached = usage.num_cached_tokens
        except grpc.RpcError as error:
            raise self._connection.error_from(error, has_answer=bool(answered.token_ids)) from None
        return answered

    async def close(self) -> None:
        """See `Target`."""
        await self._channel.close()
