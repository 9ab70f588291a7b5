"""Gates in a real service, and the faults that only it can have. Event loop of the service's process only.

A gate is named after the phase that it holds: `shut` it before, it is `reached` when something stands there, `release`
opens all. Nothing here sleeps: what stands at a gate is in its phase however fast or slow the machine is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from headrace.v1 import decode_service_pb2 as pb
from headrace_core.kv.sequence_pages import SequencePages
from headrace_core.request import SampledToken
from headrace_core.testing.async_test import eventually
from headrace_core.testing.fake_model import FakeModel
from headrace_core.testing.worker_pair import all_free
from headrace_core.transfer.lease import LeaseState
from headrace_core.transfer.values import Run
from headrace_core.worker.host import HostState
from headrace_decode.service import DecodeService
from headrace_decode.session import Session
from headrace_prefill.service import PrefillService
from headrace_router.service import RouterService

from tests.matrix.held_taker import HeldTaker

_SPOILT_FRAMES = 2
"""So many there must be after the first, or they have no order."""
_THIEF = 1 << 40
"""Whose the pages are that nobody else can have."""


class Gate:
    """Lets `num_free` pass and holds what comes then, until it is opened for good."""

    def __init__(self) -> None:
        self._num_free: int | None = None
        self._opened = asyncio.Event()
        self.reached = asyncio.Event()

    def shut(self, num_free: int) -> None:
        """Hold what comes after `num_free` more."""
        self._num_free = num_free

    def open(self) -> None:
        """Hold nothing any more."""
        self._num_free = None
        self._opened.set()

    async def passed(self) -> None:
        """Return when whoever stands here may go on."""
        if self._num_free is None:
            return
        if self._num_free:
            self._num_free -= 1
            return
        self.reached.set()
        await self._opened.wait()


class Stage:
    """One service; everything but the constructor may be asked for from another process, by name."""

    def __init__(self, service: Any) -> None:
        self.service = service
        self.gates: dict[str, Gate] = {}

    def prepare(self) -> None:
        """Put gates where they must be before the service starts."""

    def begin(self) -> None:
        """Put gates into the service that has just started."""

    async def shut(self, gate: str, num_free: int) -> None:
        """Shut a gate behind `num_free` more."""
        self.gates[gate].shut(num_free)

    async def reached(self, gate: str) -> None:
        """Return when something stands at a gate."""
        await self.gates[gate].reached.wait()

    async def gauges(self) -> dict[str, float]:
        """Return its metrics without labels by name."""
        samples = (sample for metric in self.service.registry.collect() for sample in metric.samples)
        return {sample.name: sample.value for sample in samples if not sample.labels}

    async def release(self) -> None:
        """Open every gate."""
        for gate in self.gates.values():
            gate.open()


class RouterStage(Stage):
    """A router."""

    service: RouterService

    async def queued(self, count: int) -> None:
        """Return when so many requests wait for a worker."""
        await eventually(lambda: self._router.num_queued == count, f"{count} wait")

    async def starved(self) -> None:
        """Return when it knows that no worker that prefills has a page."""
        registry = self._router._flow._dispatcher._registry
        await eventually(
            lambda: not any(each.load.num_free_pages for each in registry.ready() if each.can_prefill),
            "no page is left",
        )

    async def draining(self) -> None:
        """Return when it takes nothing new."""
        await eventually(lambda: self._router._is_draining, "it drains")

    async def free(self) -> None:
        """Return when no request is left."""
        await eventually(lambda: not self._router.num_running, "no request is left")

    async def failures(self) -> dict[str, int]:
        """Return how many attempts failed, by reason."""
        samples = (sample for metric in self.service.registry.collect() for sample in metric.samples)
        found = [sample for sample in samples if sample.name == "headrace_retries_total" and sample.value]
        return {sample.labels["reason"]: round(sample.value) for sample in found}

    @property
    def _router(self) -> Any:
        return self.service._router


class _WorkerStage(Stage):
    """What both kinds of worker have; the model's own gate is called `step`."""

    def __init__(self, service: Any, model: FakeModel) -> None:
        super().__init__(service)
        self._model = model
        self._stolen = SequencePages(_THIEF)

    async def hold_steps(self, num_free: int) -> None:
        """Let `num_free` steps begin, and hold the next."""
        self._model.hold(after=num_free)

    async def step_held(self) -> None:
        """Return when a step is held."""
        await asyncio.to_thread(self._model.wait_held)

    async def release(self) -> None:
        """See `Stage`; steps go on, too."""
        await super().release()
        self._model.release()

    async def draining(self) -> None:
        """Return when it takes nothing new."""
        await eventually(lambda: self.service.host.state is not HostState.READY, "it drains")

    async def waiting(self) -> None:
        """Return when a sequence waits for pages, and no step runs."""
        board = self.service.host.board
        await eventually(lambda: board.report.num_waiting and not board.report.num_running, "one waits for pages")

    async def free(self) -> None:
        """Return when no sequence holds anything; fail if the books are wrong."""
        await all_free(self.service)

    async def take_pages(self) -> None:
        """Take every page that somebody could get."""

        def take(scheduler: Any) -> None:
            pages = scheduler.pages
            pages.reserve(self._stolen, (pages.num_available + len(self._stolen.page_ids)) * pages.page_size)

        await self._on_engine(take)

    async def give_pages(self) -> None:
        """Give them back."""
        await self._on_engine(lambda scheduler: scheduler.pages.free(self._stolen))

    async def _on_engine(self, command: Callable[[Any], None]) -> None:
        """Run it between two steps; return at once while one is held, for then it is next."""
        self.service.host.engine.submit(command)


class PrefillStage(_WorkerStage):
    """A prefill worker. Faults of frames are transport `grpc`'s; others have theirs at the decode worker."""

    service: PrefillService

    def __init__(self, service: PrefillService, model: FakeModel) -> None:
        super().__init__(service, model)
        self.gates = {"publishing": Gate(), "transferring": Gate()}
        self._frames_fault = ""
        self._is_stale = False

    def prepare(self) -> None:
        """See `Stage`: what serves is registered when the service starts."""
        for end in self.service._ends:
            pull = getattr(end, "_pull", None)
            if pull is not None:
                end._pull = self._pulling(pull)

    def begin(self) -> None:
        """See `Stage`."""
        sealer = self.service._ready._sealer
        seal = sealer.seal

        async def gated(first_page: int, pages: Any, *which: Any) -> Run:
            run = await seal(first_page, pages, *which)
            await self.gates["publishing"].passed()
            is_stale, self._is_stale = self._is_stale, False
            return _stale(run) if is_stale else run

        sealer.seal = gated

    async def dispatched(self) -> None:
        """Return when a sequence is here and has no pages yet."""
        await eventually(lambda: any(lease.state is LeaseState.QUEUED for lease in self._leases()), "one waits")

    async def spoil_frames(self, fault: str) -> None:
        """Spoil the frames that one pull has still to send."""
        self._frames_fault = fault

    async def reuse_pages(self) -> None:
        """Let the pages of a sealed run, or else of the next, have had another owner since."""
        runs = [lease.runs for lease in self._leases() if lease.runs]
        self._is_stale = not runs
        for sealed in runs:
            sealed[:] = map(_stale, sealed)

    def _leases(self) -> Sequence[Any]:
        return self.service.leases.leases

    def _pulling(self, pull: Any) -> Any:
        async def gated(request: Any, context: Any) -> AsyncIterator[bytes]:
            frames = aiter(pull(request, context))
            yield await anext(frames)
            await self.gates["transferring"].passed()
            rest = [frame async for frame in frames]
            if len(rest) >= _SPOILT_FRAMES:
                fault, self._frames_fault = self._frames_fault, ""
                rest = _spoilt(rest, fault)
            for frame in rest:
                yield frame

        return gated


def _spoilt(frames: list[bytes], fault: str) -> list[bytes]:
    match fault:
        case "corrupted":
            return [frames[0][:-1] + bytes([frames[0][-1] ^ 1]), *frames[1:]]
        case "truncated":
            return frames[:-1]
        case "duplicated":
            return [frames[0], *frames]
        case "reordered":
            return frames[::-1]
        case _:
            return frames


def _stale(run: Run) -> Run:
    return replace(run, generations=(run.generations[0] + 1, *run.generations[1:]))


class DecodeStage(_WorkerStage):
    """A decode worker."""

    service: DecodeService

    def __init__(self, service: DecodeService, model: FakeModel) -> None:
        super().__init__(service, model)
        self.gates = {"transferring": Gate(), "finishing": Gate()}
        self.entries_fault = ""
        self.bytes_fault = ""
        self._starts: list[tuple[Session, pb.StartSequence]] = []

    def begin(self) -> None:
        """See `Stage`."""
        taker = self.service._taker
        assert taker is not None, "it has started"
        taker.transports = {name: HeldTaker(end, self, taker.mover.memory) for name, end in taker.transports.items()}
        open_session, start_sequence = self.service.open_session, self.service.start_sequence

        def opened(router_id: int, *, incarnation: int | None = None) -> Session:
            session = open_session(router_id, incarnation=incarnation)
            session.next = _Told(self, session.next).next
            return session

        def started(session: Session, message: pb.StartSequence) -> None:
            self._starts.append((session, message))
            start_sequence(session, message)

        self.service.open_session, self.service.start_sequence = opened, started

    async def spoil_entries(self, fault: str) -> None:
        """Spoil the next message with tokens."""
        self.entries_fault = fault

    async def spoil_bytes(self, fault: str) -> None:
        """Spoil the bytes that the next transfer brought."""
        self.bytes_fault = fault

    async def num_preemptions(self) -> int:
        """Return how often a sequence gave its pages back."""
        return round(self.service.registry.get_sample_value("headrace_preemptions_total") or 0)

    async def start_again(self) -> tuple[int, int, bytes]:
        """Hear the first attempt's start once more, and tell of a token of it; return whose it was, and its bytes."""
        session, message = self._starts[0]
        self.service.start_sequence(session, message)
        session.put_token(message.sequence_number, message.attempt, len(message.token_ids), SampledToken(7, None))
        session.flush(0.0)
        return session.router_id, message.attempt, message.SerializeToString()


class _Told:
    """What a session tells, through the gate `finishing` and with what goes wrong on the way."""

    def __init__(self, stage: DecodeStage, tell: Callable[[], Awaitable[pb.SessionResponse]]) -> None:
        self._stage, self._tell = stage, tell
        self._kept: list[pb.SessionResponse] = []

    async def next(self) -> pb.SessionResponse:
        if self._kept:
            return self._kept.pop(0)
        message = await self._tell()
        if any(entry.tokens.finish_reason for entry in message.entries):
            await self._stage.gates["finishing"].passed()
        if self._stage.entries_fault and any(entry.HasField("tokens") for entry in message.entries):
            fault, self._stage.entries_fault = self._stage.entries_fault, ""
            return await self._spoilt(message, fault)
        return message

    async def _spoilt(self, message: pb.SessionResponse, fault: str) -> pb.SessionResponse:
        match fault:
            case "corrupted":
                for entry in message.entries:
                    entry.tokens.token_ids[:] = [1 << 20] * len(entry.tokens.token_ids)
            case "truncated":
                return await self.next()
            case "duplicated":
                self._kept.append(message)
            case "reordered":
                self._kept.append(message)
                return await self._tell()
            case _:
                raise AssertionError(f"no such fault: {fault}")
        return message
