"""`headrace plan`: the cluster that a model, an objective and a load need."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from headrace_core.errors import InvalidRequestError
from headrace_core.request_trace import Workload, load_trace, prefix_hit_share
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import Hardware, find_hardware
from headrace_core.roofline.model_shape import MODELS, Dtype, ModelShape
from rich.console import Console

from headrace_planner import plots
from headrace_planner.capacity import Demand, Plan, make_plan
from headrace_planner.cli_errors import readable_errors, written
from headrace_planner.plan_experts import experts_choice
from headrace_planner.sim_capacity import Attempt, Verified, verify_divisions
from headrace_planner.sim_result import parse_slo
from headrace_planner.sim_roofline import Machine
from headrace_planner.sim_tradeoffs import crossover, decode_speed, kv_memory
from headrace_planner.tables import print_table
from headrace_planner.workload import parse_workload, poisson

_SIMULATED = 4000
"""Requests of a trace that the plan is tried on."""

HELP = """How many prefill and decode workers a load needs, divided how, and what they cost.

Examples:
  headrace plan --workload 4000,200,10 --slo ttft=2,itl=50ms
  headrace plan --model mixtral-8x7b --hardware h100 --workload 2000,300,5
"""

app = typer.Typer(
    no_args_is_help=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)


@app.callback(invoke_without_command=True, help=HELP)
def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(MODELS)}, or a folder with config.json.")] = "deepseek-v3",
    hardware: Annotated[str, typer.Option(help="As for `headrace roofline`.")] = "h200-attainable",
    hardware_file: Annotated[Path | None, typer.Option(help="TOML or JSON with more hardware.")] = None,
    slo: Annotated[str, typer.Option(help="ttft=SECONDS,itl=SECONDS; 50ms is understood.")] = "ttft=2,itl=50ms",
    workload: Annotated[str, typer.Option(help="isl,osl,rate: tokens in, tokens out, requests per second.")] = "",
    trace: Annotated[Path | None, typer.Option(help="Mooncake .jsonl or Azure .csv, in place of --workload.")] = None,
    scale: Annotated[float, typer.Option(min=1e-6, help="Replay the trace so many times as fast.")] = 1.0,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights.")] = Dtype.FP8,
    kv_dtype: Annotated[Dtype | None, typer.Option(help="Type of cached values; default bf16.")] = None,
    max_gpus: Annotated[int, typer.Option(min=1, help="Largest worker, GPUs.")] = 64,
    simulate: Annotated[bool, typer.Option(help="Run the plan in the simulator and correct it.")] = True,
    plot_dir: Annotated[Path | None, typer.Option(help="Write trade-off plots into this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan a disaggregated cluster: workers, division, batch sizes, bandwidth, cost, and what limits."""
    with readable_errors():
        if plot_dir:
            with written(plot_dir):
                plots.check(plot_dir / "tp-dp.svg")
        shape = ModelShape.load(model)
        machine = find_hardware(hardware, hardware_file)
        requests, demand = _demand(workload, trace, scale)
        plan = make_plan(shape, machine, demand, parse_slo(slo), dtype=dtype, kv_dtype=kv_dtype, max_gpus=max_gpus)
        tried = verify_divisions(plan, requests) if simulate else []
        plan, verified = tried[0] if tried else (plan, None)
        if plot_dir:
            with written(plot_dir):
                _plot(shape, machine, dtype, plot_dir)
    if as_json:
        typer.echo(json.dumps(as_dict(plan, verified), indent=2))
        return
    _print(plan, verified)
    for other, found in tried[1:]:
        Console().print(
            f"with prefill workers of {other.prefill.machine.parallel}: "
            f"{_counted(found.config.num_prefill, found.config.num_decode)} ({found.config.num_gpus} GPUs), "
            f"{found.attainment:.1%} of requests met both objectives"
        )


def as_dict(plan: Plan, verified: Verified | None) -> dict[str, Any]:
    """Return the plan, with the workers that its simulation took, as plain numbers."""
    report: dict[str, Any] = {
        "prefill": {
            "num_workers": plan.prefill.num_workers,
            "parallel": str(plan.prefill.machine.parallel),
            "step_tokens": plan.prefill.step_tokens,
            "ttft_s": plan.prefill.ttft_s,
            "limit": plan.prefill.limit,
        },
        "decode": {
            "num_workers": plan.decode.num_workers,
            "parallel": str(plan.decode.machine.parallel),
            "batch": plan.decode.batch,
            "step_s": plan.decode.step_s,
            "kv_tokens": plan.decode.kv_tokens,
            "limit": plan.decode.limit,
        },
        "left_out": left_out(plan.decode.machine.hardware),
        "experts": (why := experts_choice(plan.decode, plan.demand.context)) and asdict(why),
        "num_gpus": plan.num_gpus,
        "transfer_bytes_per_s": plan.transfer_bytes_per_s,
        "link_bytes_per_s": plan.link_bytes_per_s,
        "cost_per_million_tokens": plan.cost_per_million_tokens,
        "cost_per_million_output_tokens": plan.cost_per_million_output_tokens,
    }
    if verified:
        report["simulated"] = {
            "num_prefill": verified.config.num_prefill,
            "num_decode": verified.config.num_decode,
            "num_gpus": verified.config.num_gpus,
            "goal": verified.goal,
            "is_met": verified.is_met,
            "out_of_reach": verified.out_of_reach,
            "late": verified.late,
            "slow": verified.slow,
            "attempts": [asdict(attempt) for attempt in verified.attempts],
            **verified.result.summary(plan.slo),
        }
    return report


def _demand(workload: str, trace: Path | None, scale: float) -> tuple[Workload, Demand]:
    if bool(workload) == bool(trace):
        raise InvalidRequestError("BAD_WORKLOAD", "give either --workload isl,osl,rate or --trace FILE")
    if trace:
        requests = load_trace(trace).scaled(scale)
        demand = Demand(
            float(requests.num_prompt.mean()),
            float(requests.num_output.mean()),
            requests.rate,
            prefix_hit_share(requests),
            float(requests.num_prompt.max()),
            float(np.square(requests.num_prompt).mean() / requests.num_prompt.mean() ** 2),
        )
        return requests.head(_SIMULATED), demand
    lengths, rate = parse_workload(workload)
    # Long enough for decode batches to fill: a few times what is in flight.
    requests = poisson(lengths, rate=rate, num_requests=int(min(20_000, max(500, rate * 120))))
    return requests, Demand(lengths.num_prompt, lengths.num_output, rate)


def _print(plan: Plan, verified: Verified | None) -> None:
    console, prefill, decode = Console(), plan.prefill, plan.decode
    demand = plan.demand
    console.print(
        f"{demand.rate:.3g} requests/s, {demand.num_prompt:.0f} tokens in ({demand.cached_share:.0%} cached), "
        f"{demand.num_output:.0f} out; TTFT <= {plan.slo.ttft_s:g} s, ITL <= {plan.slo.itl_s:g} s"
    )
    console.print(left_out(decode.machine.hardware))
    if verified:
        ttft_s, itl_s = np.nanpercentile(verified.result.ttft_s, 99), verified.result.itl_percentile(50)
        times = (f"TTFT p99 {ttft_s:.2f} s", f"ITL p50 {itl_s * 1e3:.1f} ms")
    else:
        times = (f"TTFT p99 {prefill.ttft_s:.2f} s", f"ITL {decode.step_s * 1e3:.1f} ms")
    batches = (f"{prefill.step_tokens} tokens", f"{decode.batch} rows")
    rows = [
        [name, str(option.num_workers), str(option.machine.parallel), str(option.num_gpus), batch, time]
        for name, option, batch, time in zip(("prefill", "decode"), (prefill, decode), batches, times, strict=True)
    ]
    columns = ("", "workers", "division", "GPUs", "full step", "simulated" if verified else "expected")
    print_table(console, columns, rows, left=("division",))
    console.print(f"limit of prefill: {prefill.limit}; of decode: {decode.limit}")
    console.print(
        f"hand-off: {plan.transfer_bytes_per_s / 1e9:.2f} GB/s in all, {plan.link_bytes_per_s / 1e9:.1f} GB/s per "
        f"prefill worker to move a prompt within a decode step; {plan.num_gpus} GPUs, "
        f"${plan.cost_per_million_tokens:.3f} per million tokens, "
        f"${plan.cost_per_million_output_tokens:.3f} per million output tokens"
    )
    others = [f"{o.machine.parallel} x{o.num_workers} = {o.num_gpus} GPUs" for o in plan.decode_options[1:4]]
    console.print(f"next best for decode: {'; '.join(others) or 'none'}")
    if why := experts_choice(decode, demand.context):
        console.print(f"decode's {why}")
    if verified:
        _print_verified(console, plan, verified)


def left_out(hardware: Hardware) -> str:
    """Return what the plan does not know, to be read before what it promises."""
    is_attainable = hardware.name.endswith("attainable")
    roof = f"what good kernels reach ({hardware.name})" if is_attainable else (
        f"the peaks of {hardware.name}, which no kernel reaches"
    )  # fmt: skip
    return (
        f"Reckoned with {roof}. Left out: what starting a kernel costs, experts that are not chosen evenly, answers "
        "that end early, workers that fail. A plan is where to start measuring."
    )


def _print_verified(console: Console, plan: Plan, verified: Verified) -> None:
    """Say what the simulator measured, how it got there, and what no number of workers changes."""
    result, config = verified.result, verified.config
    console.print(
        f"simulated with {_counted(config.num_prefill, config.num_decode)} ({config.num_gpus} GPUs): "
        f"{verified.attainment:.1%} of requests met both objectives ({verified.late:.1%} missed TTFT, "
        f"{verified.slow:.1%} ITL), goodput {result.goodput(plan.slo):.3g}/s, "
        f"prefill {result.utilisation('prefill'):.0%} and decode {result.utilisation('decode'):.0%} busy"
    )
    if len(verified.attempts) > 1:
        console.print(f"tried, prefill + decode workers: {'; '.join(map(_tried, verified.attempts))}")
    if verified.out_of_reach:
        console.print(
            f"at least {verified.out_of_reach:.1%} of requests miss the objective on any number of such workers: even "
            "alone, with every shared prefix cached, they take longer; other workers or another objective would help"
        )
    if verified.goal < verified.asked:
        console.print(f"so the goal is {verified.asked:.0%} of the others: {verified.goal:.1%}")
    if not verified.is_met:
        why = "more workers of either kind do not help" if verified.is_exhausted else "it takes still more workers"
        console.print(f"the goal, {verified.goal:.1%} of requests, is not met: {why}")


def _tried(attempt: Attempt) -> str:
    note = "" if attempt.is_kept else ", no better, taken back"
    return f"{attempt.num_prefill} + {attempt.num_decode}: {attempt.attainment:.1%}{note}"


def _counted(num_prefill: int, num_decode: int) -> str:
    return f"{num_prefill} prefill and {num_decode} decode worker{'' if num_decode == 1 else 's'}"


def _plot(shape: ModelShape, hardware: Hardware, dtype: Dtype, folder: Path) -> None:
    def on(parallel: Parallelism, model: ModelShape = shape) -> Machine:
        return Machine(model, hardware, parallel, dtype)

    eight = Parallelism(8, 1, 1)
    models = [on(eight), *(on(eight, MODELS[name]) for name in ("mixtral-8x7b",) if name != shape.name)]
    tp, dp = on(Parallelism(8, 1, 8)), on(Parallelism(1, 8, 8))
    cross = crossover(tp, dp, context=4096)
    title = f"{shape.name}, 8 GPUs, 4096 tokens: DP attention wins from batch {cross.batch}"
    plots.save(
        [kv_memory(models, context=4096), decode_speed([tp, dp], context=4096, title=title)], folder / "tp-dp.svg"
    )
    experts = [
        on(Parallelism(1, 8, 1)),
        on(Parallelism(1, 8, 8)),
        on(Parallelism(1, 16, 16)),
        on(Parallelism(1, 32, 32)),
    ]
    plots.save(
        [decode_speed(experts, context=2048, most=16384, title=f"{shape.name}: experts by TP (EP1) or EP")],
        folder / "tp-ep.svg",
    )
