"""The capacity planner: how many prefill and decode workers, how divided, for an objective and a load.

Each phase is planned by itself, which is what disaggregation is for:

    decode    the largest batch whose step takes no longer than the ITL objective and whose caches fit; of all ways to
              divide the model over 1 ... 64 GPUs the one with the most tokens per second and GPU
    prefill   the fewest GPUs for which 99 % of prompts wait, compute and move within the TTFT objective, prompts
              arriving at random (M/D/c: Erlang's C, waits halved because service times are even)

Step times are the roofline's. `sim_capacity.verify` simulates the plan and adds the workers it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from headrace_core.errors import InvalidRequestError
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.memory import kv_bytes_per_token_per_gpu, weight_bytes_per_gpu
from headrace_core.roofline.model_shape import Dtype, ModelShape
from headrace_core.roofline.step_load import StepLoad

from headrace_planner.divisible import is_divisible
from headrace_planner.sim_result import Slo
from headrace_planner.sim_roofline import Machine

MEMORY_SHARE = 0.9
"""Of a GPU's memory, for weights and caches; the rest is activations and the runtime."""
TARGET_LOAD = 0.85
"""Share of a decode worker's best rate that is planned with: arrivals are uneven."""
MAX_ROWS = 16384
_MOST_TP = 8
_STEP_TOKENS_PER_GPU = 8192


@dataclass(frozen=True, slots=True)
class Demand:
    """What comes in: means, and requests per second. `cached_share` of prompt tokens are in prefix caches."""

    num_prompt: float
    num_output: float
    rate: float
    cached_share: float = 0.0
    max_prompt: float = 0.0
    """Longest prompt, which must fit; 0: the mean."""
    spread: float = 1.0
    """Mean square over squared mean of prompt lengths: long prompts attend to more than their share."""

    @property
    def context(self) -> float:
        """Mean tokens that a decoding sequence attends to."""
        return self.num_prompt + self.num_output / 2

    @property
    def longest(self) -> float:
        """Tokens of the longest sequence."""
        return max(self.num_prompt, self.max_prompt) + self.num_output


@dataclass(frozen=True, slots=True)
class DecodeOption:
    """One way to decode. `batch` sequences of a whole worker; rates per worker."""

    machine: Machine
    batch: int
    step_s: float
    kv_tokens: int
    """Tokens the worker's caches hold."""
    num_workers: int
    limit: str

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of one worker, batch full."""
        return self.batch / self.step_s

    @property
    def num_gpus(self) -> int:
        """Of all workers."""
        return self.num_workers * self.machine.parallel.num_gpus

    @property
    def tokens_per_gpu(self) -> float:
        """Output tokens per second and GPU, batch full."""
        return self.tokens_per_s / self.machine.parallel.num_gpus


@dataclass(frozen=True, slots=True)
class PrefillOption:
    """One way to prefill."""

    machine: Machine
    step_tokens: int
    service_s: float
    """Seconds of work a prompt is, when steps are full."""
    latency_s: float
    """Seconds a prompt takes by itself."""
    wait_s: float
    """99th percentile of the time in the queue."""
    transfer_s: float
    kv_tokens: int
    num_workers: int
    limit: str

    @property
    def num_gpus(self) -> int:
        """Of all workers."""
        return self.num_workers * self.machine.parallel.num_gpus

    @property
    def ttft_s(self) -> float:
        """99th percentile that the plan expects."""
        return self.wait_s + self.latency_s


@dataclass(frozen=True, slots=True)
class Plan:
    """A cluster for a demand. Rates in bytes per second."""

    demand: Demand
    slo: Slo
    prefill: PrefillOption
    decode: DecodeOption
    transfer_bytes_per_s: float
    """All hand-offs together, on average."""
    prefill_options: Sequence[PrefillOption]
    decode_options: Sequence[DecodeOption]

    @property
    def link_bytes_per_s(self) -> float:
        """What one prefill worker's link must carry for a hand-off to take no longer than a decode step."""
        per_prompt = self.transfer_bytes_per_s / self.demand.rate
        return max(self.transfer_bytes_per_s / self.prefill.num_workers, per_prompt / self.decode.step_s)

    def with_workers(self, num_prefill: int, num_decode: int) -> Plan:
        """Return the plan with as many workers as its simulation took."""
        prefill, decode = self.prefill, self.decode
        return replace(
            self,
            prefill=replace(prefill, num_workers=num_prefill),
            decode=replace(decode, num_workers=num_decode),
        )

    @property
    def num_gpus(self) -> int:
        """Of the whole cluster."""
        return self.prefill.num_gpus + self.decode.num_gpus

    @property
    def cost_per_million_tokens(self) -> float:
        """Dollars per million tokens, prompt and output, at the hardware table's price per hour."""
        per_hour = self.num_gpus * self.decode.machine.hardware.cost_per_hour
        return per_hour / (self.demand.rate * (self.demand.num_prompt + self.demand.num_output) * 3600) * 1e6

    @property
    def cost_per_million_output_tokens(self) -> float:
        """The same, per million output tokens."""
        return self.cost_per_million_tokens * (1 + self.demand.num_prompt / self.demand.num_output)


def divisions(shape: ModelShape, max_gpus: int = 64) -> Iterator[Parallelism]:
    """Return the ways to divide a model that are considered: TP or DP attention, experts by TP or EP."""
    gpus = 1
    while gpus <= max_gpus:
        for ep in sorted({1, gpus} if shape.moe else {1}):
            ways = [Parallelism(gpus, 1, ep)] if gpus <= _MOST_TP else []
            if gpus > 1 and (ep == gpus or gpus <= _MOST_TP):
                ways.append(Parallelism(1, gpus, ep))
            yield from (way for way in ways if is_divisible(shape, way))
        gpus *= 2


def kv_tokens(machine: Machine) -> int:
    """Return the tokens that the caches of a whole worker hold; negative if the weights do not fit."""
    hardware, parallel = machine.hardware, machine.parallel
    weights = weight_bytes_per_gpu(machine.shape, parallel, machine.dtype)
    per_token = kv_bytes_per_token_per_gpu(machine.shape, parallel, machine.kv_dtype or Dtype.BF16)
    return int((MEMORY_SHARE * hardware.memory_bytes - weights) / per_token * parallel.dp)


def decode_options(machines: Sequence[Machine], demand: Demand, slo: Slo) -> list[DecodeOption]:
    """Return what can decode within the objective, most tokens per second and GPU first."""
    options: list[DecodeOption] = []
    for machine in machines:
        capacity = kv_tokens(machine)
        rows_by_memory = int(min(MAX_ROWS, capacity / (demand.num_prompt + demand.num_output)))
        if rows_by_memory < machine.parallel.dp or capacity / machine.parallel.dp < demand.longest:
            continue
        batch = _largest(lambda rows, m=machine: m.decode_s(rows, demand.context) <= slo.itl_s, rows_by_memory)
        if not batch:
            continue
        step_s = machine.decode_s(batch, demand.context)
        rate = batch / step_s * TARGET_LOAD
        workers = max(1, math.ceil(demand.rate * demand.num_output / rate))
        limit = "KV memory" if batch == rows_by_memory < MAX_ROWS else "ITL objective"
        load = StepLoad.decode(batch, batch * demand.context)
        options.append(
            DecodeOption(machine, batch, step_s, capacity, workers, f"{limit}; step: {_bound(machine, load)}")
        )
    return sorted(options, key=lambda option: (option.num_gpus, -option.tokens_per_gpu))


def prefill_options(
    machines: Sequence[Machine], demand: Demand, slo: Slo, *, link_bytes_per_s: float
) -> list[PrefillOption]:
    """Return what can prefill within the objective, fewest GPUs first."""
    options: list[PrefillOption] = []
    computed = max(1.0, demand.num_prompt * (1 - demand.cached_share))
    cached = demand.num_prompt - computed
    for machine in machines:
        capacity = kv_tokens(machine)
        if capacity / machine.parallel.dp < max(demand.num_prompt, demand.max_prompt):
            continue
        groups = machine.parallel.dp
        latency_s = machine.step(StepLoad.prefill(round(computed), round(cached))).time_s
        # A full step: as many prompts as its budget holds, at least one on each data-parallel group.
        step_tokens = machine.parallel.num_gpus * _STEP_TOKENS_PER_GPU
        prompts = max(groups, int(step_tokens / computed) // groups * groups)
        load = StepLoad.prefill(round(computed), round(cached), batch=prompts)
        load = replace(load, prefill_pairs=load.prefill_pairs * demand.spread)
        service_s = machine.step(load).time_s / prompts
        num_bytes = demand.num_prompt * machine.shape.kv_bytes_per_token(machine.kv_dtype or Dtype.BF16)
        transfer_s = num_bytes / link_bytes_per_s
        found = _fewest_workers(demand.rate, service_s, slo.ttft_s - latency_s)
        if found is None:
            continue
        workers, wait_s = found
        limit = "throughput" if demand.rate * service_s > 0.7 * workers else "TTFT objective"
        options.append(
            PrefillOption(
                machine, step_tokens, service_s, latency_s, wait_s, transfer_s, capacity, workers,
                f"{limit}; step: {_bound(machine, load)}",
            )
        )  # fmt: skip
    return sorted(options, key=lambda option: (option.num_gpus, option.ttft_s))


def make_plan(
    shape: ModelShape,
    hardware: Hardware,
    demand: Demand,
    slo: Slo,
    *,
    dtype: Dtype = Dtype.BF16,
    kv_dtype: Dtype | None = None,
    max_gpus: int = 64,
) -> Plan:
    """Plan a disaggregated cluster.

    Raises:
        InvalidRequestError: NO_PLAN, saying which phase can't meet the objective and how close it comes.
    """
    machines = [Machine(shape, hardware, parallel, dtype, kv_dtype) for parallel in divisions(shape, max_gpus)]
    link = hardware.network_bytes_per_s or hardware.link_bytes_per_s
    decodes = decode_options(machines, demand, slo)
    if not decodes:
        raise InvalidRequestError("NO_PLAN", _why_no_decode(machines, demand, slo))
    prefills = prefill_options(machines, demand, slo, link_bytes_per_s=link)
    if not prefills:
        fits = [m for m in machines if kv_tokens(m) / m.parallel.dp >= demand.num_prompt]
        best = min((m.step(StepLoad.prefill(round(demand.num_prompt))).time_s for m in fits), default=math.inf)
        text = (
            f"no division prefills {demand.num_prompt:.0f} tokens within {slo.ttft_s} s; the fastest takes {best:.3g}"
        )
        raise InvalidRequestError("NO_PLAN", text)
    per_token = shape.kv_bytes_per_token(kv_dtype or Dtype.BF16)
    total = demand.rate * demand.num_prompt * per_token
    decode = decodes[0]
    return Plan(
        demand,
        slo,
        prefills[0],
        decode,
        total,
        prefills,
        decodes,
    )


def erlang_c(num_servers: int, load: float) -> float:
    """Return the probability that an arrival waits: Poisson arrivals, `load` servers busy on average."""
    if load >= num_servers:
        return 1.0
    blocked = 1.0  # Erlang's B, by its recurrence
    for servers in range(1, num_servers + 1):
        blocked = load * blocked / (servers + load * blocked)
    share = load / num_servers
    return blocked / (1 - share * (1 - blocked))


def wait_percentile(num_servers: int, rate: float, service_s: float, percent: float = 99.0) -> float:
    """Return a percentile of the wait with even service times: half of what exponential ones give."""
    load = rate * service_s
    if load >= num_servers:
        return math.inf
    waits = erlang_c(num_servers, load)
    rest = 1 - percent / 100
    if waits <= rest:
        return 0.0
    return math.log(waits / rest) * service_s / (num_servers - load) / 2


def _fewest_workers(rate: float, service_s: float, slack_s: float) -> tuple[int, float] | None:
    """Return how many servers keep the wait below `slack_s`, and the wait; None if none can."""
    if slack_s <= 0:
        return None
    servers = max(1, math.ceil(rate * service_s + 1e-9))
    while servers < 1 << 20:
        wait_s = wait_percentile(servers, rate, service_s)
        if wait_s <= slack_s:
            return servers, wait_s
        servers += 1
    return None


def _largest(is_within: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` for which a falling predicate holds; 0 if none."""
    low, high = 0, most + 1
    while high - low > max(1, low // 128):
        middle = (low + high) // 2
        if is_within(middle):
            low = middle
        else:
            high = middle
    return low


def _bound(machine: Machine, load: StepLoad) -> str:
    shares = machine.step(load).shares_by_bound()
    bound = max(shares, key=lambda name: shares[name])
    return f"{shares[bound]:.0%} {bound}-bound"


def _why_no_decode(machines: Sequence[Machine], demand: Demand, slo: Slo) -> str:
    fitting = [m for m in machines if kv_tokens(m) / m.parallel.dp >= demand.longest]
    if not fitting:
        most = max((m.parallel.num_gpus for m in machines), default=0)
        return f"the model and one sequence of {demand.longest:.0f} tokens fit no division over up to {most} GPUs"
    best = min(m.decode_s(m.parallel.dp, demand.context) for m in fitting)
    return f"no division decodes within {slo.itl_s} s a token; the fastest step takes {best:.3g} s"
