"""`headrace simulate`: a cluster that does not exist yet, under a load that may come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Annotated, Any

import typer
from headrace_core.errors import InvalidRequestError
from headrace_core.expert_placement import balanced, in_order
from headrace_core.request_trace import Workload, load_trace
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import find_hardware
from headrace_core.roofline.model_shape import MODELS, Dtype, ModelShape
from headrace_core.roofline.routing import Routing
from headrace_router.placement.preferences import PREFERENCES
from rich.console import Console

from headrace_planner import plots
from headrace_planner.capacity import kv_tokens
from headrace_planner.cli_errors import readable_errors, written
from headrace_planner.divisible import check_divides
from headrace_planner.measured_times import load_tables, measured_times
from headrace_planner.plots import Figure, Line
from headrace_planner.report import seconds
from headrace_planner.sim_capacity import wire_of
from headrace_planner.sim_config import Fidelity, SimConfig, WorkerSpec, random_outages
from headrace_planner.sim_result import SimResult, Slo, parse_slo
from headrace_planner.sim_roofline import Machine, roofline_times
from headrace_planner.sim_studies import Study
from headrace_planner.simulator import simulate
from headrace_planner.step_times import LinearStepTimes, StepTimes
from headrace_planner.studies import STUDIES
from headrace_planner.tables import print_table
from headrace_planner.workload import Lengths, closed_loop, parse_workload, poisson

HELP = """Run a cluster in simulated time, with the product's own schedulers.

Examples:
  headrace simulate --prefill 2 --decode 1 --workload 4000,200,10
  headrace simulate --prefill 2 --decode 1 --trace trace.jsonl --slo ttft=2,itl=50ms
  headrace simulate --both 3 --workload 2000,300,5 --json
"""

app = typer.Typer(
    no_args_is_help=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)

_CONTEXT = 131_072


@dataclass(frozen=True, slots=True)
class _Speed:
    """Where step times come from, beside the roofline."""

    tables: Path | None
    fitted: Path | None
    zipf: float
    replicas: int


@app.callback(invoke_without_command=True, help=HELP)
def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(MODELS)}, or a folder with config.json.")] = "deepseek-v3",
    hardware: Annotated[str, typer.Option(help="As for `headrace roofline`.")] = "h200-attainable",
    hardware_file: Annotated[Path | None, typer.Option(help="TOML or JSON with more hardware.")] = None,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers.")] = 0,
    decode: Annotated[int, typer.Option(min=0, help="Decode workers.")] = 0,
    both: Annotated[int, typer.Option(min=0, help="Colocated workers.")] = 0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallelism of attention, of every worker.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Data parallelism of attention, of every worker.")] = 8,
    ep: Annotated[int, typer.Option(min=1, help="Expert parallelism; a divisor of tp*dp.")] = 8,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights.")] = Dtype.FP8,
    step_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens of a step.")] = 65_536,
    max_rows: Annotated[int, typer.Option(min=1, help="Sequences of a decode step.")] = 2048,
    workload: Annotated[str, typer.Option(help="isl,osl,rate: tokens in, tokens out, requests per second.")] = "",
    trace: Annotated[Path | None, typer.Option(help="Mooncake .jsonl or Azure .csv, in place of --workload.")] = None,
    scale: Annotated[float, typer.Option(min=1e-6, help="Replay the trace so many times as fast.")] = 1.0,
    requests: Annotated[int, typer.Option(min=0, help="At most so many requests; 0: the trace's, or 2000.")] = 0,
    spread: Annotated[float, typer.Option(min=0, help="Log-normal spread of lengths; 0: all equal.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=0, help="Closed loop of so many clients; the rate is unused.")] = 0,
    slo: Annotated[str, typer.Option(help="ttft=SECONDS,itl=SECONDS; 50ms is understood.")] = "ttft=2,itl=50ms",
    placement: Annotated[
        str, typer.Option(help=f"Which prefill worker gets a prompt: {', '.join(PREFERENCES)}.")
    ] = "affinity",
    fidelity: Annotated[str, typer.Option(help="exact, fast or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and failures.")] = 0,
    mtbf_s: Annotated[float, typer.Option(min=0, help="Mean seconds between a worker's failures; 0: none.")] = 0.0,
    repair_s: Annotated[float, typer.Option(min=0, help="Seconds until a failed worker is back.")] = 60.0,
    zipf: Annotated[float, typer.Option(min=0, help="Exponent of expert popularity; 0: uniform.")] = 0.0,
    replicas: Annotated[int, typer.Option(min=-1, help="EPLB with so many redundant experts; -1: no EPLB.")] = -1,
    tables: Annotated[Path | None, typer.Option(help="Folder of aiconfigurator's CSV tables: measured times.")] = None,
    fitted: Annotated[Path | None, typer.Option(help="JSON of a fitted linear model: prefill and decode.")] = None,
    study: Annotated[str, typer.Option(help=f"Make a figure of the docs: {', '.join(STUDIES)}.")] = "",
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a plot to this .svg or .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Simulate, and report goodput, percentiles and utilisation."""
    with readable_errors():
        if plot:
            with written(plot):
                plots.check(plot)
        if study:
            _run_study(study, trace, plot)
            return
        machine = Machine(
            ModelShape.load(model), find_hardware(hardware, hardware_file), Parallelism(tp, dp, ep), dtype
        )
        check_divides(machine.shape, machine.parallel)
        load = _workload(workload, trace, scale, requests, spread, concurrency, seed)
        times = _times(machine, _Speed(tables, fitted, zipf, replicas), max_rows, step_tokens)
        outages = ()
        if mtbf_s:
            until_s = max(load.duration_s, 3600.0)
            outages = random_outages(
                prefill + decode + both, mtbf_s=mtbf_s, repair_s=repair_s, until_s=until_s, seed=seed
            )
        spec_prefill, spec_decode = (_spec(machine, kind, max_rows, step_tokens) for kind in times)
        config = SimConfig(
            spec_prefill, spec_decode, spec_prefill if both else None, prefill, decode, both,
            wire=wire_of(machine), fidelity=_fidelity(fidelity), outages=outages, placement=_placement(placement),
        )  # fmt: skip
        objective = parse_slo(slo)
        result = simulate(config, load)
        if plot:
            with written(plot):
                plots.save(_figures(result), plot)
    if as_json:
        typer.echo(json.dumps(result.summary(objective), indent=2))
    else:
        _print(result, objective)


def _placement(name: str) -> str:
    if name not in PREFERENCES:
        raise InvalidRequestError("BAD_OPTION", f"--placement {name!r} is none of {', '.join(PREFERENCES)}")
    return name


def _workload(
    text: str, trace: Path | None, scale: float, requests: int, spread: float, concurrency: int, seed: int
) -> Workload:
    if bool(text) == bool(trace):
        raise InvalidRequestError("BAD_WORKLOAD", "give either --workload isl,osl,rate or --trace FILE")
    if trace:
        recorded = load_trace(trace).scaled(scale)
        return recorded.head(requests) if requests else recorded
    means, rate = parse_workload(text)
    lengths = Lengths(means.num_prompt, means.num_output, spread, spread)
    if concurrency:
        return closed_loop(lengths, concurrency=concurrency, num_requests=requests or 4 * concurrency, seed=seed)
    return poisson(lengths, rate=rate, num_requests=requests or 2000, seed=seed)


def _times(machine: Machine, speed: _Speed, max_rows: int, step_tokens: int) -> tuple[StepTimes, StepTimes]:
    """Return the step times of prefill and decode workers."""
    if speed.fitted:
        try:
            value: dict[str, Any] = json.loads(speed.fitted.read_text())
            return LinearStepTimes(**value["prefill"]), LinearStepTimes(**value["decode"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = f'{speed.fitted}: {error!r}; expected {{"prefill": {{...}}, "decode": {{...}}}}'
            raise InvalidRequestError("BAD_FIT", text) from error
    imbalance = _imbalance(machine, speed)
    if speed.tables:
        loaded = load_tables(speed.tables, ep=machine.parallel.ep)
        table = measured_times(machine, loaded, max_rows=max_rows, max_tokens=step_tokens, max_context=_CONTEXT)
    else:
        table = roofline_times(machine, max_rows=max_rows, max_tokens=step_tokens, max_context=_CONTEXT)
    table = table.with_imbalance(imbalance)
    return table, table


def _imbalance(machine: Machine, speed: _Speed) -> float:
    moe, ep = machine.shape.moe, machine.parallel.ep
    if moe is None or ep == 1 or not speed.zipf:
        return 1.0
    loads = Routing(zipf=speed.zipf).probabilities(moe.num_experts, moe.num_experts_per_token)
    placed = in_order(len(loads), ep) if speed.replicas < 0 else balanced(loads, ep, redundant=speed.replicas)
    return placed.imbalance(loads)


def _spec(machine: Machine, times: StepTimes, max_rows: int, step_tokens: int) -> WorkerSpec:
    tokens = kv_tokens(machine)
    if tokens <= 0:
        text = (
            f"{machine.shape.name} in {machine.dtype.value} does not fit {machine.parallel} of {machine.hardware.name}"
        )
        raise InvalidRequestError("NO_MEMORY", text)
    return WorkerSpec(
        times,
        num_pages=tokens // 64,
        max_step_tokens=max(step_tokens, max_rows),
        max_step_sequences=max_rows,
        num_gpus=machine.parallel.num_gpus,
        groups=machine.parallel.dp,
    )


def _fidelity(text: str) -> Fidelity:
    known: dict[str, Fidelity] = {"exact": "exact", "fast": "fast", "auto": "auto"}
    if text not in known:
        raise InvalidRequestError("BAD_FIDELITY", f"{text!r} is not one of {', '.join(known)}")
    return known[text]


def _print(result: SimResult, slo: Slo) -> None:
    console, summary = Console(), result.summary(slo)
    columns = ("p25", "p50", "p99", "mean")
    rows: list[list[str]] = []
    for name in ("ttft_s", "itl_s", "tpot_s", "e2e_s"):
        values: dict[str, float] = summary[name]
        # Of a single token there are no gaps.
        cells = ["-" if isnan(values[column]) else seconds(values[column]) for column in columns]
        rows.append([name.removesuffix("_s").upper(), *cells])
    print_table(console, ("", *columns), rows)
    busy = ", ".join(f"{role} {share:.0%}" for role, share in summary["utilisation"].items())
    console.print(
        f"{summary['num_done']} of {summary['num_requests']} requests done, {summary['num_refused']} refused, "
        f"{summary['num_retried']} retried; {summary['request_rate']:.3g} requests/s, "
        f"{summary['output_tokens_per_s']:.0f} output tokens/s; goodput {summary['goodput']:.3g}/s "
        f"({summary['slo_attainment']:.1%} met both objectives)"
    )
    console.print(
        f"busy: {busy}; cached {summary['cached_prompt_share']:.0%} of prompt tokens; "
        f"{summary['transfer_bytes'] / 1e9:.1f} GB handed off; {result.end_s:.0f} s simulated in "
        f"{result.wall_s:.1f} s, fidelity {result.fidelity}"
    )


def _figures(result: SimResult) -> list[Figure]:
    percents = list(range(1, 100))
    ttft = sorted(float(x) for x in result.ttft_s if x == x)
    ys = [ttft[min(len(ttft) - 1, len(ttft) * p // 100)] for p in percents]
    itl = [1e3 * result.itl_percentile(p) for p in percents]
    return [
        Figure("TTFT", "percent of requests", "seconds", [Line("TTFT", percents, ys)]),
        Figure("ITL", "percent of tokens", "milliseconds", [Line("ITL", percents, itl)]),
    ]


def _run_study(name: str, trace: Path | None, path: Path | None) -> None:
    if name not in STUDIES:
        raise InvalidRequestError("BAD_STUDY", f"{name!r} is not one of {', '.join(STUDIES)}")
    study: Study = STUDIES[name](trace)
    print_table(Console(), study.columns, study.rows)
    if path:
        with written(path):
            plots.save(study.figures, path)
