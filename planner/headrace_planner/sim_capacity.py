"""A plan, run in the simulator: what it really gives, and the workers it lacked.

Workers are added where the objective is missed, a quarter more at a time: prefill workers while more requests miss
TTFT, decode workers while more miss ITL. A full decode side delays first tokens, too, since the router holds prompts
back until there is room for their output: if workers on the one side do not help, the other side is tried. An addition
that does not help is taken back. It ends when enough requests meet the objective, or neither side helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from headrace_core.request_trace import Workload
from headrace_core.roofline.model_shape import Dtype

from headrace_planner.capacity import Plan
from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.sim_lone import is_out_of_reach
from headrace_planner.sim_result import SimResult, Slo
from headrace_planner.sim_roofline import Machine, roofline_times
from headrace_planner.simulator import simulate

_PAGE_SIZE = 64
_MAX_ADDITIONS = 12
_LEAST_GAIN = 0.001
"""Share of requests that an addition must bring within the objective to be kept,"""
_LEAST_SPEEDUP = 0.05
"""or how much less the request at the goal's percentile must take: far from the goal, all may still miss."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One cluster that was simulated."""

    num_prefill: int
    num_decode: int
    attainment: float
    """Share of all requests that met both objectives."""
    is_kept: bool
    """False: it was no better than the one before."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A plan whose counts the simulator corrected, and what it measured. Shares are of all requests."""

    config: SimConfig
    result: SimResult
    attainment: float
    asked: float
    """Share that was asked to meet the objective."""
    goal: float
    """The same, or where fewer can meet it, so much of those that can."""
    out_of_reach: float
    """Least share that misses the objective on any number of workers; see `sim_lone`."""
    late: float
    """Share that missed TTFT."""
    slow: float
    """Share that missed ITL."""
    attempts: Sequence[Attempt]
    is_exhausted: bool
    """True if more workers, on either side, were tried and did not help."""

    @property
    def is_met(self) -> bool:
        """Whether the goal was reached."""
        return self.attainment >= self.goal > 0

    @property
    def is_all_asked(self) -> bool:
        """Whether as many met the objective as were asked to, not only of those that can."""
        return self.attainment >= self.asked


def worker_spec(machine: Machine, *, kv_tokens: int, max_rows: int, step_tokens: int, max_context: int) -> WorkerSpec:
    """Return a worker of `machine` as the simulator takes it."""
    times = roofline_times(machine, max_rows=max_rows, max_tokens=step_tokens, max_context=max_context)
    return WorkerSpec(
        times,
        num_pages=max(1, kv_tokens // _PAGE_SIZE),
        page_size=_PAGE_SIZE,
        max_step_tokens=max(step_tokens, max_rows),
        max_step_sequences=max_rows,
        num_gpus=machine.parallel.num_gpus,
        groups=machine.parallel.dp,
    )


def wire_of(machine: Machine) -> Wire:
    """Return what a hand-off costs between workers of `machine`: every GPU has a link of its own."""
    hardware = machine.hardware
    per_gpu = hardware.network_bytes_per_s or hardware.link_bytes_per_s
    return Wire(
        bytes_per_token=machine.shape.kv_bytes_per_token(machine.kv_dtype or Dtype.BF16),
        bandwidth=per_gpu * machine.parallel.num_gpus,
        overlap=0.9,
        rpc_s=2e-4,
        admit_s=1e-3,
    )


def config_of(plan: Plan) -> SimConfig:
    """Return the plan's cluster."""
    longest = int(2 * plan.demand.longest)
    prefill, decode = plan.prefill, plan.decode
    return SimConfig(
        prefill=worker_spec(
            prefill.machine,
            kv_tokens=prefill.kv_tokens,
            max_rows=256,
            step_tokens=prefill.step_tokens,
            max_context=longest,
        ),
        decode=worker_spec(
            decode.machine,
            kv_tokens=decode.kv_tokens,
            max_rows=decode.batch,
            step_tokens=max(1024, decode.batch),
            max_context=longest,
        ),
        num_prefill=prefill.num_workers,
        num_decode=decode.num_workers,
        wire=wire_of(prefill.machine),
        fidelity="fast",
    )


def verify(plan: Plan, workload: Workload, *, attainment: float = 0.95) -> Verified:
    """Simulate the plan; while fewer than `attainment` meet the objective, add workers where it is missed."""
    return correct(config_of(plan), workload, plan.slo, attainment=attainment)


def verify_divisions(plan: Plan, workload: Workload) -> list[tuple[Plan, Verified]]:
    """Simulate the plan; if it lacked workers, also with the best prefill workers whose attention is divided otherwise.

    Steps that wait for one long prompt among data-parallel groups are what the arithmetic of means does not see.
    Returns what was simulated, each plan with as many workers as it took, the best first: where as many requests as
    were asked for meet the objective the one with fewer GPUs, else the one that comes closer.
    """
    is_dp = plan.prefill.machine.parallel.dp > 1
    tried = [(plan, verify(plan, workload))]
    other = next((option for option in plan.prefill_options if (option.machine.parallel.dp > 1) != is_dp), None)
    if other and (len(tried[0][1].attempts) > 1 or not tried[0][1].is_all_asked):
        otherwise = replace(plan, prefill=other)
        tried.append((otherwise, verify(otherwise, workload)))
    tried.sort(key=lambda pair: (0, pair[1].config.num_gpus) if pair[1].is_all_asked else (1, -pair[1].attainment))
    return [(each.with_workers(found.config.num_prefill, found.config.num_decode), found) for each, found in tried]


def correct(config: SimConfig, workload: Workload, slo: Slo, *, attainment: float = 0.95) -> Verified:
    """Add workers to a disaggregated cluster, as the module says, until `attainment` of requests meet `slo`."""
    in_reach = 1 - float(is_out_of_reach(config, workload, slo).mean())
    goal = attainment if in_reach >= attainment else attainment * in_reach
    best = _measure(config, workload, slo, goal)
    attempts, untried = [best.attempt(is_kept=True)], best.sides()
    while best.attainment < goal and untried and len(attempts) <= _MAX_ADDITIONS:
        found = _measure(_grown(best.config, untried.pop(0)), workload, slo, goal)
        is_kept = found.is_better_than(best)
        attempts.append(found.attempt(is_kept=is_kept))
        if is_kept:
            best, untried = found, found.sides()
    return Verified(
        config=best.config,
        result=best.result,
        attainment=best.attainment,
        asked=attainment,
        goal=goal,
        out_of_reach=1 - in_reach,
        late=best.late,
        slow=best.slow,
        attempts=attempts,
        is_exhausted=not untried,
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    config: SimConfig
    result: SimResult
    attainment: float
    late: float
    slow: float
    excess: float
    """Times the objective, TTFT or ITL, that the request at the goal's percentile took."""

    def attempt(self, *, is_kept: bool) -> Attempt:
        return Attempt(self.config.num_prefill, self.config.num_decode, self.attainment, is_kept)

    def sides(self) -> list[str]:
        """Return where to add workers: first where more requests miss."""
        return ["prefill", "decode"] if self.late >= self.slow else ["decode", "prefill"]

    def is_better_than(self, other: _Measured) -> bool:
        gain = self.attainment - other.attainment
        return gain >= _LEAST_GAIN or (gain >= 0 and self.excess <= (1 - _LEAST_SPEEDUP) * other.excess)


def _measure(config: SimConfig, workload: Workload, slo: Slo, goal: float) -> _Measured:
    result = simulate(config, workload)
    # Who did not end, being refused, never got a token.
    ttft = np.where(result.recorder.is_done, result.ttft_s, np.inf) / slo.ttft_s
    tpot = np.nan_to_num(result.tpot_s, nan=0.0) / slo.itl_s
    return _Measured(
        config,
        result,
        result.attainment(slo),
        late=float((ttft > 1).mean()),
        slow=float((tpot > 1).mean()),
        excess=float(np.quantile(np.maximum(ttft, tpot), goal, method="higher")),
    )


def _grown(config: SimConfig, side: str) -> SimConfig:
    """Return `config` with a quarter more workers on one side."""
    if side == "prefill":
        return replace(config, num_prefill=config.num_prefill + -(-config.num_prefill // 4))
    return replace(config, num_decode=config.num_decode + -(-config.num_decode // 4))
