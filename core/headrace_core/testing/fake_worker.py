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
from typing import Any, Literal

import uvloop
from headrace.v1 import decode_service_pb2 as pb
from headrace.v1 import hold_service_pb2, types_pb2, worker_service_pb2

from headrace_core import rpc
from headrace_core.batch.spec import SequenceSpec
from headrace_core.beats import Outbox
from headrace_core.door import LONG_CALLS, Door
from headrace_core.errors import HeadraceError, OverloadedError, UnavailableError
from headrace_core.request import TokenLogprobs, hash_tokens
from headrace_core.testing.fake_holder import FakeHeld, FakeTake, hold
from headrace_core.testing.fake_script import (
    FakeFaults,
    FakeSequence,
    NextToken,
    check_size,
    finish_of,
    mixed,
    prompt_logprobs,
    scripted,
    spec_of,
)
from headrace_core.testing.fake_servicer import FakeServicer
from headrace_core.testing.garbler import Garbler
from headrace_core.transfer.connections import Connections
from headrace_core.transfer.hold import Side, TakeError
from headrace_core.transfer.values import Admission, FirstToken, Order, Owner
from headrace_core.wire import decode_layout, encode_failure, encode_finish, encode_logprobs, encode_prompt_logprobs

FakeRole = Literal["prefill", "decode", "both"]
_ROLES: dict[FakeRole, types_pb2.WorkerRole.ValueType] = {
    "prefill": types_pb2.WORKER_ROLE_PREFILL,
    "decode": types_pb2.WORKER_ROLE_DECODE,
    "both": types_pb2.WORKER_ROLE_BOTH,
}
_SIDES = {
    Side.TAKER: pb.FAILURE_SIDE_DECODE,
    Side.HOLDER: pb.FAILURE_SIDE_PREFILL,
    Side.CHANNEL: pb.FAILURE_SIDE_CHANNEL,
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
        has_grammars: bool = True,
        fingerprint: str = "fa4e" * 16,
        layout: types_pb2.KvLayout = _LAYOUT,
    ) -> None:
        """Describe it; `step_s` None means that the test calls `step`."""
        self.address = ""
        self.faults = FakeFaults()
        self.garbler = Garbler()
        self.incarnation = secrets.randbits(64)
        self.prefills: list[SequenceSpec] = []
        """What was ordered of it."""
        self.starts: list[pb.StartSequence] = []
        self.cancels: list[pb.CancelSequence] = []
        self.held: dict[Owner, FakeHeld] = {}
        self.cached_pages: Sequence[int] = ()
        """What it says it has in a prefix cache, by pages' hashes."""
        self.sequences: dict[tuple[int, int], FakeSequence] = {}
        """Those that joined, by router and number."""
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
            has_grammars=has_grammars,
        )
        self.next_token = next_token or mixed(vocab_size)
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._connections = Connections()
        self._starting: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._pages: dict[tuple[int, int], int] = {}
        """Of every sequence that was started and is not over."""
        self._sessions: dict[int, Outbox[pb.SessionResponse]] = {}
        self._changed = asyncio.Event()
        self._is_draining = False
        self._stepping: asyncio.Task[None] | None = None
        self._server: rpc.Server | None = None
        self._servicer = FakeServicer(self)

    @property
    def is_empty(self) -> bool:
        """True if it holds no page, no lease and no sequence."""
        return not (self._pages or self.held or self.sequences)

    @property
    def num_leases(self) -> int:
        """Sequences computed and held."""
        return sum(held.num_pages > 0 for held in self.held.values())

    async def start(self, listen: str = "127.0.0.1:0") -> str:
        """Serve; return the address."""
        self._server = rpc.Server(
            ["headrace.v1.WorkerService"], door=Door(methods=LONG_CALLS), interceptors=[self.garbler]
        )
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
        for starting in list(self._starting.values()):
            starting.cancel()
        await self._connections.close()
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
        entries: dict[int, list[pb.StepEntry]] = {}
        for sequence in list(self.sequences.values()):
            entries.setdefault(sequence.router_id, []).append(self._advance(sequence))
        for router_id, messages in entries.items():
            self.emit(router_id, messages)

    def emit(self, router_id: int, entries: Sequence[pb.StepEntry]) -> None:
        """Send entries by hand."""
        outbox = self._sessions.get(router_id)
        if outbox is not None:
            outbox.put(pb.SessionResponse(entries=entries, step_us=100))

    def load(self) -> worker_service_pb2.WatchLoadResponse:
        """Return the load now."""
        num_in_use = sum(self._pages.values()) + sum(held.num_pages for held in self.held.values())
        num_leases = self.num_leases
        return worker_service_pb2.WatchLoadResponse(
            num_free_pages=max(0, self.info.num_pages - num_in_use),
            num_running=len(self.sequences),
            num_waiting=len(self.held) - num_leases + len(self._starting),
            num_leases=num_leases,
            is_draining=self._is_draining,
            pages_cached=self.cached_pages,
            is_cache_whole=True,
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

    def hold(self, order: Order, outbox: Outbox[hold_service_pb2.HoldResponse]) -> FakeHeld:
        """See `hold.Holder`."""
        self.prefills.append(order.spec)
        if self._is_draining:
            raise UnavailableError("DRAINING", "draining")
        check_size(self.info, len(order.spec.token_ids), num_more=0)
        return hold(self, order, outbox)

    def start_sequence(self, router_id: int, message: pb.StartSequence) -> None:
        """Serve `SessionRequest.start`."""
        self.starts.append(message)
        key = router_id, message.sequence_number
        self._end(key)
        self._starting[key] = asyncio.create_task(self._start(key, message, is_refused=self._is_draining))
        self._pages[key] = self._num_pages(len(message.token_ids))
        self.on_change()

    def cancel_sequence(self, router_id: int, message: pb.CancelSequence) -> None:
        """Serve `SessionRequest.cancel`."""
        self.cancels.append(message)
        if not self.faults.ignores_cancel:
            self._end((router_id, message.sequence_number))

    def open_session(self, router_id: int) -> Outbox[pb.SessionResponse]:
        """Serve the beginning of `DecodeService.Session`."""
        outbox = self._sessions[router_id] = Outbox(pb.SessionResponse())
        outbox.put(pb.SessionResponse())
        return outbox

    def close_session(self, router_id: int, outbox: Outbox[pb.SessionResponse]) -> None:
        """Serve the end of `DecodeService.Session`."""
        if self._sessions.get(router_id) is not outbox:
            return
        del self._sessions[router_id]
        for key in list(self._pages):
            if key[0] == router_id:
                self._end(key)

    async def _start(self, key: tuple[int, int], message: pb.StartSequence, *, is_refused: bool) -> None:
        """Bring a sequence to where it runs."""
        spec = spec_of(message)
        position = len(spec.token_ids)
        try:
            if is_refused:
                raise UnavailableError("DRAINING", "draining")
            check_size(self.info, len(spec.token_ids), num_more=1)
            joined = pb.Joined(queue_us=10)
            is_scored = spec.params.prompt_logprobs is not None
            if message.prefill_address and not is_scored:
                order = Order(
                    owner=key,
                    spec=spec,
                    timeout_s=message.timeout_ms / 1000,
                    tokens_sha256=hash_tokens(spec.token_ids),
                    fingerprint=self.info.model_fingerprint,
                    layout=decode_layout(self.info.layout),
                )
                address = message.prefill_address
                async with self._connections.use(address) as channel, FakeTake(channel, order, address) as take:
                    admission, first = await take.first()
                    self._tell(key, message.attempt, position, prefilled=self._prefilled(admission, first))
                    if first.finish:
                        self._end(key)
                        return
                    spec.token_ids.append(first.token.token_id)
                    position += 1
                    await self._wait_to_join()
                    await take.confirm()
                num_pages = self._pages[key]
                joined = pb.Joined(transfer_us=200, transport="fake", hidden_transfer_us=1 << 40)
                joined.num_transfer_pages, joined.transfer_bytes = num_pages, num_pages * 1536
                joined.hidden_transfer_bytes = 512
            else:
                await self._wait_to_join()
            self._tell(key, message.attempt, position, joined=joined)
            for part in prompt_logprobs(spec, self.faults) if is_scored else ():
                self._tell(key, message.attempt, position, prompt_logprobs=encode_prompt_logprobs(part))
        except (HeadraceError, TakeError) as error:
            cause, side = (error.error, error.side) if isinstance(error, TakeError) else (error, Side.TAKER)
            self._tell(key, message.attempt, position, failure=encode_failure(cause, _SIDES[side]))
            self._end(key)
            return
        fault = self.faults.sequence.popleft() if self.faults.sequence else None
        self.sequences[key] = FakeSequence(
            *key, message.attempt, spec.token_ids, message.num_prompt_tokens, spec.params, fault
        )
        self._starting.pop(key, None)
        self.on_change()

    async def _wait_to_join(self) -> None:
        await self.faults.join_gate.wait()
        if self.faults.join:
            raise self.faults.join.popleft()

    def _prefilled(self, admission: Admission, first: FirstToken) -> pb.Prefilled:
        logprobs = first.token.logprobs
        prefilled = pb.Prefilled(
            token_id=first.token.token_id,
            logprobs=encode_logprobs(logprobs) if logprobs else None,
            tokens_sha256=first.tokens_sha256,
            decode_queue_us=10,
            prefill_queue_us=round(admission.queue_s * 1e6),
            prefill_us=round(first.compute_s * 1e6),
            finish_reason=encode_finish(first.finish),
        )
        if self.faults.prefilled:
            self.faults.prefilled.popleft()(prefilled)
        return prefilled

    def _tell(self, key: tuple[int, int], attempt: int, position: int, **event: Any) -> None:
        self.emit(key[0], [pb.StepEntry(sequence_number=key[1], attempt=attempt, position=position, **event)])

    def _end(self, key: tuple[int, int]) -> None:
        """Drop a sequence, whatever its phase, and free its pages; an unknown one is no error."""
        starting = self._starting.pop(key, None)
        if starting is not None and starting is not asyncio.current_task():
            starting.cancel()
        self.sequences.pop(key, None)
        if self._pages.pop(key, None) is not None:
            self.on_change()

    async def _step_for_ever(self, step_s: float) -> None:
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + step_s, time.monotonic())
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            await self.faults.step_gate.wait()
            self.step()
            if not self.sequences:
                await self.wait_change(1.0)

    def _advance(self, sequence: FakeSequence) -> pb.StepEntry:
        """Make one sequence's tokens of a step; drop it when it ends."""
        key = sequence.router_id, sequence.number
        entry = pb.StepEntry(sequence_number=sequence.number, attempt=sequence.attempt, position=len(sequence.tokens))
        error = sequence.fault[1] if sequence.fault is not None and sequence.num_made >= sequence.fault[0] else None
        if self._num_pages(len(sequence.tokens)) > self.info.num_pages:
            error = OverloadedError("NO_FREE_PAGES", "the sequence outgrew the whole pool")
        if error is not None:
            entry.failure.CopyFrom(encode_failure(error, pb.FAILURE_SIDE_DECODE))
            self._end(key)
            return entry
        for _ in range(self._tokens_per_step):
            token_id = self.next_token(sequence.tokens, sequence.num_prompt_tokens)
            sequence.tokens.append(token_id)
            sequence.num_made += 1
            entry.tokens.token_ids.append(token_id)
            if sequence.params.top_logprobs is not None:
                entry.tokens.logprobs.append(encode_logprobs(TokenLogprobs(-0.5, ((token_id, -0.5),))))
            finish = finish_of(self.info, sequence.tokens, sequence.num_prompt_tokens, sequence.params)
            if finish is not None:
                entry.tokens.finish_reason = encode_finish(finish)
                self._end(key)
                break
        return entry

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.info.layout.page_size)


async def _main() -> None:
    parser = argparse.ArgumentParser(description="A worker that speaks the real wire and computes nothing.")
    parser.add_argument("--role", choices=list(_ROLES), default="both", help="what it does")
    parser.add_argument("--listen", default="127.0.0.1:0", help="host:port; port 0 lets the kernel choose")
    parser.add_argument("--step-ms", type=float, default=20.0, help="time between steps, milliseconds")
    parser.add_argument("--vocab-size", type=int, default=1000, help="it makes token ids 32 to 126: text, to bytes")
    parser.add_argument("--max-step-sequences", type=int, default=256, help="it runs at once")
    options = parser.parse_args()
    worker = FakeWorker(
        options.role,
        next_token=scripted(range(32, min(127, options.vocab_size))),
        step_s=options.step_ms / 1000,
        num_pages=1 << 16,
        max_context_tokens=1 << 16,
        max_step_tokens=1 << 14,
        max_step_sequences=options.max_step_sequences,
        vocab_size=options.vocab_size,
    )
    sys.stdout.write(f"{await worker.start(options.listen)}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_main())
