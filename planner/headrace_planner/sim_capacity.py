"""A plan, run in the simulator: what it really gives, and the workers it lacked."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headrace_core.roofline.model_shape import Dtype

from headrace_planner.capacity import Plan
from headrace_planner.sim_config import SimConfig, Wire, WorkerSpec
from headrace_planner.sim_result import SimResult
from headrace_planner.sim_roofline import Machine, roofline_times
from headrace_planner.simulator import simulate
from headrace_planner.trace import Workload

_PAGE_SIZE = 64
_MAX_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Verified:
    """A plan whose counts the simulator corrected, and what it measured."""

    num_prefill: int
    num_decode: int
    attainment: float
    result: SimResult


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
    """Simulate the plan; while too few requests meet the objective, add workers where it was missed."""
    config = config_of(plan)
    result = simulate(config, workload)
    for _ in range(_MAX_ROUNDS):
        if result.attainment(plan.slo) >= attainment:
            break
        late = float((result.ttft_s > plan.slo.ttft_s).mean())
        slow = float((result.tpot_s > plan.slo.itl_s).mean())
        # A full decode side holds prompts back, too, in the router's queue: the busier side is the one to blame.
        if late > slow and result.utilisation("prefill") > 0.5:
            config = replace(config, num_prefill=config.num_prefill + -(-config.num_prefill // 4))
        else:
            config = replace(config, num_decode=config.num_decode + -(-config.num_decode // 4))
        result = simulate(config, workload)
    return Verified(config.num_prefill, config.num_decode, result.attainment(plan.slo), result)
