"""Workers that speak the real wire and compute nothing. For tests and load measurements; ships with the product.

A fake worker has real gRPC services, page accounting, leases and sessions; its tokens come from a function, its time
from `step_s` or from the test, which steps it by hand. Faults are queued: each is used once. As a process:

    python -m headrace_core.testing.fake_worker --role both --listen 127.0.0.1:0 --step-ms 20
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Literal

import grpc.aio
from headrace.v1 import (
    decode_service_pb2,
    prefill_service_pb2,
    transfer_service_pb2,
    transfer_service_pb2_grpc,
    types_pb2,
    worker_service_pb2,
)

from headrace_core import rpc
from headrace_core.errors import (
    ConflictError,
    NotFoundError,
    OverloadedError,
    TransferCorruptError,
    UnavailableError,
)
from headrace_core.request import DEFAULT_MAX_TOKENS, FinishReason, SamplingParams, hash_tokens
from headrace_core.testing.fake_script import FakeFaults, FakeSequence, NextToken, check_size, mixed, scripted
from headrace_core.testing.fake_servicer import FakeServicer
from headrace_core.testing.garbler import Garbler
from headrace_core.wire import decode_sampling, encode_failure, encode_finish

FakeRole = Literal["prefill", "decode", "both"]
_ROLES: dict[FakeRole, types_pb2.WorkerRole.ValueType] = {
    "prefill": types_pb2.WORKER_ROLE_PREFILL,
    "decode": types_pb2.WORKER_ROLE_DECODE,
    "both": types_pb2.WORKER_ROLE_BOTH,
}
_LAYOUT = types_pb2.KvLayout(
    num_layers=2,
    page_size=16,
    dtype=types_pb2.CACHE_DTYPE_FLOAT32,
    latent=types_pb2.LatentLayout(kv_lora_rank=8, rope_dim=4),
)


class FakeWorker:
    """One fake worker. Event loop only."""

    def __init__(
        self,
        role: FakeRole,
        *,
        next_token: NextToken | None = None,
        step_s: float | None = 0.0,
        tokens_per_step: int = 1,
        num_pages: int = 256,
        max_context_tokens: int = 1024,
        max_step_tokens: int = 256,
        max_step_sequences: int = 64,
        vocab_size: int = 1000,
        eos_token_ids: Sequence[int] = (),
        fingerprint: str = "fa4e" * 16,
        layout: types_pb2.KvLayout = _LAYOUT,
    ) -> None:
        """Describe it; `step_s` None means that the test calls `step`."""
        self.address = ""
        self.faults = FakeFaults()
        self.garbler = Garbler()
        self.incarnation = secrets.randbits(64)
        self.prefills: list[prefill_service_pb2.PrefillRequest] = []
        self.starts: list[decode_service_pb2.StartRequest] = []
        self.cancels: list[decode_service_pb2.CancelRequest] = []
        self.leases: dict[str, int] = {}
        self.sequences: dict[tuple[str, int], FakeSequence] = {}
        self.info = worker_service_pb2.GetInfoResponse(
            role=_ROLES[role],
            incarnation=self.incarnation,
            model_name="fake",
            model_fingerprint=fingerprint,
            layout=layout,
            num_pages=num_pages,
            max_context_tokens=max_context_tokens,
            max_step_tokens=max_step_tokens,
            max_step_sequences=max_step_sequences,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            transports=["fake"],
        )
        self._next_token = next_token or mixed(vocab_size)
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._leases_of: dict[tuple[str, int], str] = {}
        self._pages_in_use = 0
        self._num_prefilling = 0
        self._sessions: dict[str, asyncio.Queue[decode_service_pb2.StreamStepsResponse]] = {}
        self._changed = asyncio.Event()
        self._is_draining = False
        self._stepping: asyncio.Task[None] | None = None
        self._server: rpc.Server | None = None
        self._servicer = FakeServicer(self)

    @property
    def is_empty(self) -> bool:
        """True if it holds no page, no lease, no sequence, and no prefill is under way."""
        return not (self._pages_in_use or self.leases or self.sequences or self._num_prefilling)

    async def start(self, listen: str = "127.0.0.1:0") -> str:
        """Serve; return the address."""
        self._server = rpc.Server(["headrace.v1.WorkerService"], interceptors=[self.garbler])
        self._servicer.add_to(self._server.grpc)
        self.address = self._server.bind(listen)
        await self._server.start()
        await self._server.set_ready(True)
        if self._step_s is not None:
            self._stepping = asyncio.create_task(self._step_for_ever(self._step_s))
        return self.address

    async def stop(self) -> None:
        """Go away at once, as a killed process does: every call under way ends."""
        if self._stepping is not None:
            self._stepping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._stepping
            self._stepping = None
        if self._server is not None:
            await self._server.stop(0)

    async def set_ready(self, is_ready: bool) -> None:
        """Change what health says."""
        assert self._server is not None, "it was started"
        await self._server.set_ready(is_ready)

    def drain(self) -> None:
        """Refuse new work."""
        self._is_draining = True
        self.on_change()

    def step(self) -> None:
        """Run one step: every sequence makes its next tokens."""
        outputs: dict[str, list[decode_service_pb2.SequenceOutput]] = {}
        for sequence in list(self.sequences.values()):
            outputs.setdefault(sequence.session_id, []).append(self._advance(sequence))
        for session_id, messages in outputs.items():
            self.emit(session_id, messages)

    def emit(self, session_id: str, outputs: Sequence[decode_service_pb2.SequenceOutput]) -> None:
        """Send outputs by hand."""
        queue = self._sessions.get(session_id)
        if queue is not None:
            queue.put_nowait(decode_service_pb2.StreamStepsResponse(outputs=outputs, step_us=100))

    def load(self) -> worker_service_pb2.WatchLoadResponse:
        """Return the load now."""
        return worker_service_pb2.WatchLoadResponse(
            num_free_pages=self.info.num_pages - self._pages_in_use,
            num_running=len(self.sequences),
            num_waiting=self._num_prefilling,
            num_leases=len(self.leases),
            is_draining=self._is_draining,
        )

    def on_change(self) -> None:
        """The load is another one."""
        self._changed.set()

    async def wait_change(self, timeout_s: float) -> None:
        """Wait for the next change of the load, at most so long."""
        self._changed.clear()
        # Not wait_for: it loses a cancellation that comes with the change, and the server would never stop.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    async def prefill(self, request: prefill_service_pb2.PrefillRequest) -> prefill_service_pb2.PrefillResponse:
        """Serve `PrefillService.Prefill`."""
        self.prefills.append(request)
        if self._is_draining:
            raise UnavailableError("DRAINING", "draining")
        check_size(self.info, len(request.token_ids), num_more=0)
        self._num_prefilling += 1
        self.on_change()
        try:
            await self.faults.prefill_gate.wait()
            if self.faults.prefill:
                raise self.faults.prefill.popleft()
            response = self._prefilled(request)
            if self.faults.tickets:
                self.faults.tickets.popleft()(response.handoff)
            if not response.finish_reason:
                await self.faults.answer_gate.wait()
            return response
        finally:
            self._num_prefilling -= 1
            self.on_change()

    def cancel_prefill(self, request: prefill_service_pb2.CancelPrefillRequest) -> None:
        """Serve `PrefillService.CancelPrefill`."""
        self.release(self._leases_of.pop((request.request_id, request.sample_index), ""))

    def release(self, lease_id: str) -> None:
        """Serve `TransferService.ReleaseLease`."""
        self._pages_in_use -= self.leases.pop(lease_id, 0)
        self.on_change()

    async def run_sequence(self, request: decode_service_pb2.StartRequest) -> decode_service_pb2.StartResponse:
        """Serve `DecodeService.Start`."""
        self.starts.append(request)
        if self._is_draining:
            raise UnavailableError("DRAINING", "draining")
        check_size(self.info, len(request.token_ids), num_more=1)
        await self.faults.start_gate.wait()
        if self.faults.start:
            raise self.faults.start.popleft()
        if request.session_id not in self._sessions:
            raise NotFoundError("UNKNOWN_SESSION", "no such session")
        response = decode_service_pb2.StartResponse(queue_us=10)
        tokens = list(request.token_ids)
        num_pages = self._num_pages(len(tokens))
        if request.HasField("handoff"):
            if request.handoff.tokens_sha256 != hash_tokens(tokens):
                raise TransferCorruptError("TOKENS_MISMATCH", "the ticket is of other tokens")
            await _release_at_holder(request.handoff)
            response.transfer_us, response.transport = 200, "fake"
            response.num_transfer_pages = num_pages
            response.transfer_bytes = num_pages * 1536
            tokens.append(request.handoff.first_token_id)
        fault = self.faults.sequence.popleft() if self.faults.sequence else None
        params = decode_sampling(request.sampling)
        sequence = FakeSequence(
            request.session_id, request.sequence_number, tokens, request.num_prompt_tokens, params, fault, num_pages
        )
        self.sequences[request.session_id, request.sequence_number] = sequence
        self._pages_in_use += num_pages
        self.on_change()
        return response

    def end(self, session_id: str, number: int) -> None:
        """Drop a sequence and free its pages; an unknown one is no error."""
        sequence = self.sequences.pop((session_id, number), None)
        if sequence is not None:
            self._pages_in_use -= sequence.num_pages
            self.on_change()

    def open_session(self, session_id: str) -> asyncio.Queue[decode_service_pb2.StreamStepsResponse]:
        """Serve the beginning of `DecodeService.StreamSteps`."""
        if session_id in self._sessions:
            raise ConflictError("SESSION_EXISTS", "the session exists")
        queue: asyncio.Queue[decode_service_pb2.StreamStepsResponse] = asyncio.Queue()
        queue.put_nowait(decode_service_pb2.StreamStepsResponse())
        self._sessions[session_id] = queue
        return queue

    def close_session(self, session_id: str) -> None:
        """Serve the end of `DecodeService.StreamSteps`."""
        self._sessions.pop(session_id, None)
        for owner, number in list(self.sequences):
            if owner == session_id:
                self.end(owner, number)

    async def _step_for_ever(self, step_s: float) -> None:
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + step_s, time.monotonic())
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            await self.faults.step_gate.wait()
            self.step()
            if not self.sequences:
                await self.wait_change(1.0)

    def _prefilled(self, request: prefill_service_pb2.PrefillRequest) -> prefill_service_pb2.PrefillResponse:
        params = decode_sampling(request.sampling)
        owner = (request.request_id, request.sample_index)
        self.release(self._leases_of.pop(owner, ""))
        tokens = list(request.token_ids)
        tokens.append(self._next_token(tokens, request.num_prompt_tokens))
        finish = self._finish(tokens, request.num_prompt_tokens, params)
        handoff = types_pb2.Handoff(
            request_id=request.request_id,
            attempt=request.attempt,
            holder_endpoint=self.address,
            holder_incarnation=self.incarnation,
            model_fingerprint=self.info.model_fingerprint,
            layout=self.info.layout,
            num_tokens=len(request.token_ids),
            tokens_sha256=hash_tokens(request.token_ids),
            first_token_id=tokens[-1],
            sampling_state=types_pb2.SamplingState(
                seed=request.sampling.seed, sample_index=request.sample_index, position=len(tokens)
            ),
        )
        if params.top_logprobs is not None:
            handoff.first_token_logprobs.CopyFrom(_logprobs(tokens[-1]))
        if finish is None:
            lease_id, num_pages = secrets.token_hex(8), self._num_pages(len(request.token_ids))
            handoff.lease.lease_id, handoff.lease.duration_ms = lease_id, 30_000
            self.leases[lease_id] = num_pages
            self._leases_of[owner] = lease_id
            self._pages_in_use += num_pages
        return prefill_service_pb2.PrefillResponse(
            handoff=handoff, finish_reason=encode_finish(finish), queue_us=20, compute_us=300
        )

    def _advance(self, sequence: FakeSequence) -> decode_service_pb2.SequenceOutput:
        """Make one sequence's tokens of a step; drop it when it ends."""
        output = decode_service_pb2.SequenceOutput(sequence_number=sequence.number)
        error = sequence.fault[1] if sequence.fault is not None and sequence.num_made >= sequence.fault[0] else None
        if self._num_pages(len(sequence.tokens)) > self.info.num_pages:
            error = OverloadedError("NO_FREE_PAGES", "the sequence outgrew the whole pool")
        if error is not None:
            output.failure.CopyFrom(encode_failure(error))
            self.end(sequence.session_id, sequence.number)
            return output
        for _ in range(self._tokens_per_step):
            token_id = self._next_token(sequence.tokens, sequence.num_prompt_tokens)
            sequence.tokens.append(token_id)
            sequence.num_made += 1
            output.token_ids.append(token_id)
            if sequence.params.top_logprobs is not None:
                output.logprobs.append(_logprobs(token_id))
            finish = self._finish(sequence.tokens, sequence.num_prompt_tokens, sequence.params)
            if finish is not None:
                output.finish_reason = encode_finish(finish)
                self.end(sequence.session_id, sequence.number)
                break
        return output

    def _finish(self, tokens: Sequence[int], num_prompt_tokens: int, params: SamplingParams) -> FinishReason | None:
        eos_ids = () if params.ignore_eos else tuple(self.info.eos_token_ids)
        if tokens[-1] in (*eos_ids, *params.stop_token_ids):
            return FinishReason.STOP
        most = params.max_tokens or DEFAULT_MAX_TOKENS
        if len(tokens) - num_prompt_tokens >= most or len(tokens) >= self.info.max_context_tokens:
            return FinishReason.LENGTH
        return None

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.info.layout.page_size)


def _logprobs(token_id: int) -> types_pb2.TokenLogprobs:
    return types_pb2.TokenLogprobs(logprob=-0.5, top=[types_pb2.TopLogprob(token_id=token_id, logprob=-0.5)])


async def _release_at_holder(handoff: types_pb2.Handoff) -> None:
    """Take over as a decode worker does once the pages are verified."""
    async with rpc.channel(handoff.holder_endpoint) as channel:
        stub = transfer_service_pb2_grpc.TransferServiceStub(channel)
        request = transfer_service_pb2.ReleaseLeaseRequest(
            lease_id=handoff.lease.lease_id, holder_incarnation=handoff.holder_incarnation
        )
        try:
            await stub.ReleaseLease(request, timeout=60)
        except grpc.aio.AioRpcError as error:
            raise rpc.raised_from(error) from error


async def _main() -> None:
    parser = argparse.ArgumentParser(description="A worker that speaks the real wire and computes nothing.")
    parser.add_argument("--role", choices=list(_ROLES), default="both", help="what it does")
    parser.add_argument("--listen", default="127.0.0.1:0", help="host:port; port 0 lets the kernel choose")
    parser.add_argument("--step-ms", type=float, default=20.0, help="time between steps, milliseconds")
    parser.add_argument("--vocab-size", type=int, default=1000, help="it makes token ids 32 to 126: text, to bytes")
    options = parser.parse_args()
    worker = FakeWorker(
        options.role,
        next_token=scripted(range(32, min(127, options.vocab_size))),
        step_s=options.step_ms / 1000,
        num_pages=1 << 16,
        max_context_tokens=1 << 16,
        max_step_tokens=1 << 14,
        max_step_sequences=256,
        vocab_size=options.vocab_size,
    )
    sys.stdout.write(f"{await worker.start(options.listen)}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
