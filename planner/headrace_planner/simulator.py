"""A discrete-event simulation of router, prefill, hand-off and decode, around the product's own policies.

    arrive ─admit─► queue ─policy.plan─► decode's pages, prefill ─first token─► transfer ─► batch ─► last token
                      ▲                                                                       │
                      └────── a worker ended: prompt and tokens so far, another attempt ◄─────┘

Two fidelities. `exact`: every step goes through the product's prefill and decode schedulers, page by page. `fast`:
placement and prefill are the product's, in blocks; decode jumps over steps in which nothing changes (`sim_fast`), and
placement sees a shortlist (`sim_router`). `auto` is exact for small workloads. Deterministic: the same
configuration and workload give the same result.
"""

from __future__ import annotations

import gc
import time
from typing import Any

from headrace_core.request_trace import Workload
from headrace_router.placement.placed import Placed

from headrace_planner.sim_clock import Clock
from headrace_planner.sim_config import Outage, SimConfig, WorkerSpec
from headrace_planner.sim_engine import ExactDecodeWorker, PrefillWorker
from headrace_planner.sim_fast import FastDecodeWorker
from headrace_planner.sim_host import Host, SharedMachine
from headrace_planner.sim_request import Arrivals, SimRequest, State
from headrace_planner.sim_result import Recorder, SimResult, WorkerUse
from headrace_planner.sim_router import Account, Router

_EXACT_TOKENS = 200_000
"""Tokens, prompt and output, up to which `auto` is exact."""
_MAX_ATTEMPTS = 4
"""As the router's `--max-attempts`, for refusals. Attempts that a worker's end cost are not counted."""

DecodeWorker = ExactDecodeWorker | FastDecodeWorker


def simulate(config: SimConfig, workload: Workload) -> SimResult:
    """Run `workload` through the cluster until every request has ended."""
    began_s = time.perf_counter()
    simulation = _Simulation(config, workload)
    # Millions of small objects that are all in use: looking for garbage among them doubles the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        simulation.run()
    finally:
        if was_enabled:
            gc.enable()
    return simulation.result(time.perf_counter() - began_s)


def fidelity_of(config: SimConfig, workload: Workload) -> str:
    """Return `exact` or `fast`: what `auto` means for this workload."""
    if config.fidelity != "auto":
        return config.fidelity
    tokens = int(workload.num_prompt.sum()) // 16 + int(workload.num_output.sum())
    return "exact" if tokens * max(1, config.num_workers // 16) <= _EXACT_TOKENS else "fast"


class _Simulation:
    """The flow of requests; a `PrefillFlow` and a `DecodeFlow` for its workers."""

    def __init__(self, config: SimConfig, workload: Workload) -> None:
        self._config = config
        self._wire = config.wire
        self._workload = workload
        self._fidelity = fidelity_of(config, workload)
        self._is_exact = self._fidelity == "exact"
        self._clock = Clock()
        self._recorder = Recorder(len(workload))
        self._prefills: dict[int, PrefillWorker] = {}
        self._decodes: dict[int, DecodeWorker] = {}
        self._requests: dict[int, SimRequest] = {}
        self._num_keys = 0
        self._arrivals = Arrivals(workload, takes_all_pages=not self._is_exact)
        self._num_over = 0
        self._links: dict[int, float] = {}
        self._transfer_bytes = 0.0
        self._dead_use: dict[int, tuple[float, int, int]] = {}
        self._machine = SharedMachine(self._clock, config.interference, config.wire.crowding)
        self._router = Router(
            [self._account(number) for number in range(config.num_workers)],
            self._place,
            self._refuse,
            clock=self._clock,
            shortlist=0 if self._is_exact else config.shortlist,
            config=config,
        )

    def run(self) -> None:
        """Simulate until nothing is left to happen."""
        for outage in self._config.outages:
            self._clock.at(outage.at_s, self._fail, outage)
        if self._workload.max_in_flight:
            for _ in range(min(self._workload.max_in_flight, len(self._workload))):
                self._arrive_in_turn(None)
        elif len(self._workload):
            self._clock.at(float(self._workload.arrival_s[0]) + self._wire.admit_s, self._arrive_next)
        self._clock.run()
        assert self._num_over == len(self._workload), "a request neither ended nor was refused"

    def result(self, wall_s: float) -> SimResult:
        """Return what was measured."""
        workers: list[WorkerUse] = []
        for account in self._router.accounts:
            busy_s, steps, tokens = self._use(account.number)
            role = "both" if account.can_prefill and account.can_decode else "prefill" if account.can_prefill else ""
            workers.append(WorkerUse(account.address, role or "decode", busy_s, steps, tokens))
        recorder = self._recorder
        ends = recorder.last_s[recorder.is_done]
        return SimResult(
            workload=self._workload,
            recorder=recorder,
            workers=workers,
            end_s=float(ends.max()) if len(ends) else 0.0,
            wall_s=wall_s,
            num_events=self._clock.num_events,
            fidelity=self._fidelity,
            transfer_bytes=self._transfer_bytes,
        )

    def check_integrity(self) -> None:
        """Assert that no worker holds anything: for tests, after `run`."""
        for account in self._router.accounts:
            promises = account.promises
            assert not len(promises), f"{account.address} is promised to somebody"
            assert promises.num_unseen_pages == promises.num_tokens == 0, f"{account.address}'s books are open"
        for worker in (*self._prefills.values(), *self._decodes.values()):
            worker.check_integrity()
            assert worker.num_free_pages == worker.num_pages, f"worker {worker.number} lost pages"

    def _account(self, number: int) -> Account:
        """Start worker `number`, empty; return the router's books on it."""
        config = self._config
        unit = 1 if self._is_exact else self._workload.block_tokens
        if number < config.num_prefill:
            spec = _need(config.prefill)
            host = Host(self._machine, 0)
            prefill = PrefillWorker(
                number, spec, self._clock, self,
                host=host, unit_tokens=unit, block_tokens=self._workload.block_tokens,
            )  # fmt: skip
            self._prefills[number] = prefill
            return Account(number, f"prefill-{number}", prefill, spec, can_prefill=True, can_decode=False)
        is_both = number >= config.num_prefill + config.num_decode
        spec = _need(config.both if is_both else config.decode)
        if self._is_exact:
            decode: DecodeWorker = ExactDecodeWorker(number, spec, self._clock, self, host=Host(self._machine, 1))
        else:
            page_tokens = unit if is_both else spec.page_size
            decode = FastDecodeWorker(number, spec, self._clock, self, unit_tokens=page_tokens, is_colocated=is_both)
        self._decodes[number] = decode
        name = f"{'both' if is_both else 'decode'}-{number}"
        return Account(number, name, decode, spec, can_prefill=is_both, can_decode=True)

    def _arrive_next(self, _: object) -> None:
        """Queue a request of an open loop, admitted since it arrived; its arrival is the workload's."""
        arrivals, arrival_s = self._arrivals, self._workload.arrival_s
        request = arrivals.take(float(arrival_s[arrivals.num_arrived]))
        if arrivals.num_arrived < len(arrival_s):
            self._clock.at(float(arrival_s[arrivals.num_arrived]) + self._wire.admit_s, self._arrive_next)
        self._router.enqueue(request)

    def _arrive_in_turn(self, _: object) -> None:
        """Begin a request of a closed loop, unless the last one was asked for by others."""
        if self._arrivals.num_arrived < len(self._workload):
            request = self._arrivals.take(self._clock.now_s)
            self._clock.after(self._machine.crowded(self._wire.admit_s), self._router.enqueue, request)

    def _place(self, placed: Placed[SimRequest, Account]) -> None:
        request, prefill, decode = placed.entry, placed.prefill, placed.decode
        if prefill is not None and request.num_tokens <= self._local_below(placed):
            prefill = None
        self._num_keys += 1
        request.key, request.placed_s, request.placed = self._num_keys, self._clock.now_s, placed
        request.attempt += 1
        request.state = State.PREFILL
        request.num_to_prefill = request.num_tokens
        request.prefill, request.decode = (prefill.number if prefill else -1), decode.number
        request.has_pages = request.is_offered = False
        self._requests[request.key] = request
        self._clock.after(self._machine.crowded(self._wire.rpc_s), self._send, request.key)

    def _local_below(self, placed: Placed[SimRequest, Account]) -> int:
        worker = self._decodes[placed.decode.number]
        if not (self._config.predicts_local and isinstance(worker, ExactDecodeWorker)):
            return 0
        return self._router.local_below(placed, worker.num_running, worker.step_s, self._wire)

    def _send(self, key: int) -> None:
        request = self._requests.get(key)
        if request is None:
            return
        has_handoff = request.prefill >= 0
        # It has pages for the prompt before that is ordered.
        self._decodes[request.decode].add(request, self._workload.block_tokens, has_handoff=has_handoff)
        if has_handoff:
            self._prefills[request.prefill].add(request)

    def _refuse(self, request: SimRequest) -> None:
        request.state = State.REFUSED
        self._recorder.over(request, is_done=False)
        self._finish()

    def on_prefilled(self, key: int, num_cached: int) -> None:
        """See `PrefillFlow`."""
        request = self._requests.get(key)
        if request is not None:
            request.num_cached += min(num_cached, request.num_to_prefill)
            self._clock.after(self._machine.crowded(self._wire.rpc_s), self._take_first, key)

    def _take_first(self, key: int) -> None:
        request = self._requests.get(key)
        if request is None:
            return
        placed = request.promised
        placed.on_prefilled()
        self._router.accounts[request.prefill].report()
        self._router.on_first_token(request.num_to_prefill, self._clock.now_s - request.placed_s)
        self._record_token(request, self._clock.now_s)
        if request.num_left == 0:
            self._prefills[request.prefill].free(key)
            self._decodes[request.decode].abort(key)
            self._end(request)
        else:
            request.state = State.HANDOFF
            self._clock.after(self._machine.crowded(self._wire.rpc_s), self._offer, key)
        self._router.kick()

    def _offer(self, key: int) -> None:
        request = self._requests.get(key)
        if request is not None:
            request.is_offered = True
            self._transfer(request)

    def on_pages_ready(self, key: int) -> None:
        """See `DecodeFlow`."""
        request = self._requests.get(key)
        if request is not None:
            request.has_pages = True
            self._transfer(request)

    def _transfer(self, request: SimRequest) -> None:
        if not (request.has_pages and request.is_offered):
            return
        key, wire, now_s = request.key, self._wire, self._clock.now_s
        num_bytes = request.num_to_prefill * wire.bytes_per_token
        self._transfer_bytes += num_bytes
        begin_s = max(now_s, self._links.get(request.prefill, 0.0), self._links.get(request.decode, 0.0))
        end_s = begin_s + num_bytes * (1 - wire.overlap) / wire.bandwidth
        self._links[request.prefill] = self._links[request.decode] = end_s
        end_s += self._machine.crowded(wire.latency_s + wire.latency_per_token_s * request.num_to_prefill)
        self._clock.at(end_s, self._transferred, key)

    def _transferred(self, key: int) -> None:
        request = self._requests.get(key)
        if request is not None:
            self._prefills[request.prefill].free(key)
            self._decodes[request.decode].arrived(key)

    def on_started(self, key: int, num_cached: int) -> None:
        """See `DecodeFlow`."""
        request = self._requests.get(key)
        if request is None:
            return
        if request.prefill >= 0:
            request.state, request.prefill = State.DECODE, -1
        else:
            request.num_cached += num_cached
        request.promised.on_joined()
        self._router.accounts[request.decode].report()
        self._router.kick()

    def on_token(self, key: int, at_s: float, *, is_last: bool) -> None:
        """See `DecodeFlow`."""
        request = self._requests.get(key)
        if request is None:
            return
        if request.state is State.PREFILL:  # colocated: the prompt is computed
            request.state = State.DECODE
            request.promised.on_stepped()
            self._router.kick()
        self._record_token(request, at_s + self._machine.crowded(self._wire.rpc_s))
        if is_last:
            self._end(request)
            self._router.kick()

    def on_more_tokens(self, key: int, count: int, at_s: float, *, is_last: bool) -> None:
        """See `DecodeFlow`."""
        request = self._requests.get(key)
        if request is None:
            return
        request.num_done += count
        request.last_token_s = at_s + self._wire.rpc_s
        if is_last:
            self._end(request)
            self._router.kick()

    def on_gaps(self, gap_s: float, count: int, begin_s: float, num_steps: int) -> None:
        """See `DecodeFlow`."""
        self._recorder.gap(gap_s, count)
        self._recorder.tokens(begin_s + self._wire.rpc_s, gap_s, num_steps, count)

    def on_refused(self, key: int) -> None:
        """See both flows."""
        request = self._requests.get(key)
        if request is not None:
            self._abandon(request)
            if request.attempt >= _MAX_ATTEMPTS:
                self._refuse(request)
            else:
                self._router.enqueue(request)

    def on_report(self, worker: int) -> None:
        """See both flows."""
        account = self._router.accounts[worker]
        account.report()
        if self._is_exact:
            self._router.kick()

    def _record_token(self, request: SimRequest, at_s: float) -> None:
        """Take a token that is at the client at `at_s`, or later: a stream's tokens are in order."""
        at_s = max(at_s, request.last_token_s)
        request.num_done += 1
        self._recorder.tokens_in_second[int(at_s)] += 1
        if request.num_done == 1:
            request.first_token_s = at_s
        else:
            self._recorder.gap(at_s - request.last_token_s)
        request.last_token_s = at_s

    def _end(self, request: SimRequest) -> None:
        """The last token is out."""
        assert request.num_left == 0, "a request ended early"
        self._recorder.over(request, is_done=True)
        self._forget(request)
        request.state = State.DONE
        self._finish()

    def _finish(self) -> None:
        self._num_over += 1
        if self._workload.max_in_flight and self._arrivals.num_arrived < len(self._workload):
            self._clock.after(self._machine.crowded(self._wire.rpc_s), self._arrive_in_turn)

    def _forget(self, request: SimRequest) -> None:
        """Give back what was promised; nothing that still comes for this attempt finds anybody."""
        del self._requests[request.key]
        request.promised.release()
        request.key, request.placed = -1, None

    def _fail(self, outage: Outage) -> None:
        account = self._router.accounts[outage.worker]
        if not account.is_up:
            return
        (self._prefills.get(outage.worker) or self._decodes[outage.worker]).kill()
        self._dead_use[outage.worker] = self._use(outage.worker)
        account.is_up = False
        # A new process takes its place, empty, and its address; it takes work from `_repair` on.
        account.worker = self._account(outage.worker).worker
        account.report()
        account.on_change(account)
        self._router.on_fleet()
        lost = [r for r in self._requests.values() if outage.worker in (r.prefill, r.decode)]
        for request in lost:
            self._abandon(request)
            request.avoid |= {account.address}
            self._clock.after(self._config.detect_s, self._router.enqueue, request)
        self._clock.after(outage.repair_s, self._repair, account)

    def _repair(self, account: Account) -> None:
        account.is_up = True
        account.on_change(account)
        self._router.on_fleet()
        self._router.kick()

    def _abandon(self, request: SimRequest) -> None:
        """End an attempt: both legs are told, the request is ready to be queued again."""
        key = request.key
        if request.prefill >= 0:
            self._prefills[request.prefill].free(key)
        if request.decode >= 0:
            self._decodes[request.decode].abort(key)
        self._forget(request)
        request.state = State.QUEUED
        request.prefill = request.decode = -1

    def _use(self, number: int) -> tuple[float, int, int]:
        before_s, before_steps, before_tokens = self._dead_use.get(number, (0.0, 0, 0))
        worker: Any = self._prefills.get(number) or self._decodes[number]
        engine = worker if isinstance(worker, FastDecodeWorker) else worker.engine
        return before_s + engine.busy_s, before_steps + engine.num_steps, before_tokens + engine.num_tokens


def _need(spec: WorkerSpec | None) -> WorkerSpec:
    assert spec is not None, "a kind of worker that is counted has a specification"
    return spec
