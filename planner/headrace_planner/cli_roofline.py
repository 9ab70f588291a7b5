"""`headrace roofline`: what a step of a model costs on a machine, in the terminal, as JSON, or as a web page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import HARDWARE, Hardware, find_hardware, load_hardware
from headrace_core.roofline.hardware_measure import measure_cpu
from headrace_core.roofline.model_shape import MODELS, Dtype, ModelShape
from headrace_core.roofline.operations import MlaPath, Phase
from headrace_core.roofline.roofline import Roofline, roofline
from headrace_core.roofline.routing import Routing
from rich.console import Console

from headrace_planner.cli_errors import readable_errors, written
from headrace_planner.cli_kernels import measure_kernels, show_kernels
from headrace_planner.cli_live import read_workers, save_points, show_live
from headrace_planner.compat import CompatSetting
from headrace_planner.divisible import check_divides
from headrace_planner.live import PHASES, Reading, mean_load, measured_points
from headrace_planner.measured import load_measured
from headrace_planner.page import PageContent, PageSetting, build_page
from headrace_planner.page_server import serve_page
from headrace_planner.report import as_json, print_compat, print_roofline

HELP = """Time and bytes of every operation of a step, at the roof of a machine.

Examples:
  headrace roofline
  headrace roofline --model deepseek-v3 --hardware h200 --tp 1 --dp 8 --ep 8 --dtype fp8
  headrace roofline --model DIR --hardware cpu --phase decode --batch 16
  headrace roofline --serve                       (the page, at http://127.0.0.1:8090)
  headrace roofline --live --metrics HOST:PORT    (what a worker measures, beside it)
"""

app = typer.Typer(
    no_args_is_help=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)


class _Phases(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class _Mla(Enum):
    AUTO = "auto"
    NAIVE = "naive"
    ABSORBED = "absorbed"


class _Compat(Enum):
    INTENSITY = "intensity"


@dataclass(frozen=True, slots=True)
class _Setting:
    shape: ModelShape
    hardware: Hardware
    parallel: Parallelism
    routing: Routing
    dtype: Dtype
    kv_dtype: Dtype | None
    mla: MlaPath
    hardware_file: Path | None


@dataclass(frozen=True, slots=True)
class _Steps:
    """Which steps to show, and how large they are."""

    phases: _Phases
    prefill_batch: int
    batch: int
    context: int
    cached: int


@dataclass(frozen=True, slots=True)
class _Output:
    """Where to show it: on a web page if there is an address to serve it at or a file to write, or in the terminal."""

    is_json: bool
    has_formulas: bool
    address: tuple[str, int] | None
    page_path: Path | None
    measured: Path | None

    @property
    def is_page(self) -> bool:
        return bool(self.address or self.page_path)


_MODEL_HELP = f"A preset ({', '.join(MODELS)}), a config.json, or a folder that has one."
_HARDWARE_HELP = f"{', '.join(HARDWARE)}, cpu (measured now), or a name in --hardware-file."


@app.callback(invoke_without_command=True, help=HELP)
def main(
    model: Annotated[str, typer.Option(help=_MODEL_HELP)] = "deepseek-v2-lite",
    hardware: Annotated[str, typer.Option(help=_HARDWARE_HELP)] = "h200",
    hardware_file: Annotated[Path | None, typer.Option(help="TOML or JSON with more hardware.")] = None,
    phase: Annotated[_Phases, typer.Option(help="Which step to show.")] = _Phases.BOTH,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a decode step, of all GPUs.")] = 64,
    prefill_batch: Annotated[int, typer.Option(min=1, help="Prompts of a prefill step, of all GPUs.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence: prompt; cache in decode.")] = 4096,
    cached: Annotated[int, typer.Option(min=0, help="Tokens of the prompt that are in the cache already.")] = 0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallelism of attention.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Data parallelism of attention.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert parallelism; a divisor of tp*dp.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights.")] = Dtype.BF16,
    kv_dtype: Annotated[Dtype | None, typer.Option(help="Type of cached values; default: of activations.")] = None,
    mla: Annotated[_Mla, typer.Option(help="Latent attention; auto: naive prefill, absorbed decode.")] = _Mla.AUTO,
    zipf: Annotated[float, typer.Option(min=0, help="Exponent of expert popularity; 0: uniform.")] = 0.0,
    histogram: Annotated[Path | None, typer.Option(help="JSON list: how often each expert was chosen.")] = None,
    balanced: Annotated[bool, typer.Option(help="Place experts so that ranks have even loads.")] = False,
    formulas: Annotated[bool, typer.Option(help="Show each operation's formulas.")] = True,
    as_json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    compat: Annotated[_Compat | None, typer.Option(help="The MoE-intensity page's own formulas and figures.")] = None,
    serve: Annotated[bool, typer.Option(help="Serve the web page.")] = False,
    host: Annotated[str, typer.Option(help="Where to serve it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free port.")] = 8090,
    build_page_at: Annotated[Path | None, typer.Option("--build-page", help="Write the web page to this file.")] = None,
    measured: Annotated[Path | None, typer.Option(help="JSON of measured operations to lay over the page.")] = None,
    live: Annotated[bool, typer.Option("--live", help="What running workers measure, beside the prediction.")] = False,
    metrics: Annotated[list[str] | None, typer.Option(help="HOST:PORT of a worker's metrics; once per worker.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="With --live: again every two seconds.")] = False,
    save_measured: Annotated[Path | None, typer.Option(help="With --live: write a file for --measured.")] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Measure this CPU's kernels beside their floor.")] = False,
) -> None:
    """Show FLOPs, bytes, intensity, limit and time of every operation of a prefill and a decode step."""
    if compat:
        print_compat(Console(), CompatSetting())
        return
    if kernels:
        with readable_errors():
            found = measure_kernels()
        typer.echo(json.dumps(found, indent=2)) if as_json_output else show_kernels(Console(), found)
        return
    output = _Output(as_json_output, formulas, (host, port) if serve else None, build_page_at, measured)
    with readable_errors():
        readings = _readings(metrics or [], model, save_measured) if live else None
        if readings is not None and not output.is_page:
            show_live(Console(), readings, as_json=as_json_output, watch=watch)
            return
        setting = _Setting(
            ModelShape.load(model), _find(hardware, hardware_file), Parallelism(tp, dp, ep),
            Routing(zipf, _read_histogram(histogram), balanced), dtype, kv_dtype, mla.value, hardware_file,
        )  # fmt: skip
        check_divides(setting.shape, setting.parallel)
        _show(setting, _Steps(phase, prefill_batch, batch, context, cached), output, readings)


def _readings(metrics: Sequence[str], model: str, save_measured: Path | None) -> list[Reading]:
    """Ask the workers; with `save_measured` write what they say to that file."""
    readings = read_workers(metrics)
    if save_measured:
        with written(save_measured):
            save_points(readings, ModelShape.load(model), save_measured)
    return readings


def _show(setting: _Setting, steps: _Steps, output: _Output, readings: Sequence[Reading] | None) -> None:
    console = Console()
    if output.is_page:
        _page(console, _content(setting, steps, output, readings), output.address, output.page_path)
        return
    results = _rooflines(setting, steps)
    if output.is_json:
        typer.echo(json.dumps({name: as_json(result, setting.kv_dtype) for name, result in results.items()}, indent=2))
        return
    for name, result in results.items():
        print_roofline(console, name, result, has_formulas=output.has_formulas, kv_dtype=setting.kv_dtype)


def _rooflines(setting: _Setting, steps: _Steps) -> dict[str, Roofline]:
    wanted: list[tuple[Phase, int, int | None]] = []
    if steps.phases is not _Phases.DECODE:
        if steps.cached >= steps.context:
            raise ValueError(f"--cached {steps.cached} leaves nothing of --context {steps.context} to prefill")
        wanted.append(("prefill", steps.prefill_batch, steps.context - steps.cached))
    if steps.phases is not _Phases.PREFILL:
        wanted.append(("decode", steps.batch, None))
    return {
        phase: roofline(
            setting.shape, setting.hardware, phase=phase, batch=batch, context=steps.context, new_tokens=new,
            parallel=setting.parallel, routing=setting.routing, dtype=setting.dtype, kv_dtype=setting.kv_dtype,
            mla=setting.mla,
        )
        for phase, batch, new in wanted
    }  # fmt: skip


def _find(name: str, file: Path | None) -> Hardware:
    return measure_cpu() if name == "cpu" else find_hardware(name, file)


def _read_histogram(path: Path | None) -> tuple[float, ...]:
    if path is None:
        return ()
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return tuple(float(value) for value in values)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} must be a JSON list of numbers, one per expert: {error}") from None


def _content(setting: _Setting, steps: _Steps, output: _Output, readings: Sequence[Reading] | None) -> PageContent:
    parallel = setting.parallel
    first = PageSetting(
        setting.shape.name, setting.hardware.name, setting.dtype.value, steps.batch, steps.prefill_batch,
        steps.context, parallel.tp, parallel.dp, parallel.ep,
    )  # fmt: skip
    more = load_hardware(setting.hardware_file) if setting.hardware_file else {}
    content = PageContent(
        models=MODELS | {setting.shape.name: setting.shape},
        hardware=HARDWARE | more | {setting.hardware.name: setting.hardware},
        routings={"as given": setting.routing} if setting.routing != Routing() else {},
        first=first,
        measured=load_measured(output.measured) if output.measured else None,
    )
    return content if readings is None else _with_live(content, setting.shape, readings)


def _with_live(content: PageContent, shape: ModelShape, readings: Sequence[Reading]) -> PageContent:
    """Return the page with what workers measured, opened at their machine and their mean step."""
    points = measured_points(readings, shape)
    machine = next(reading.machine for reading in readings if reading.machine)
    prefill, decode = (mean_load(readings, phase) for phase in PHASES)
    batch, context = decode or prefill or (1, 1)
    first = replace(
        content.first, hardware="worker", dtype=machine.dtype.value, batch=batch, context=context,
        prompts=prefill[0] if prefill else content.first.prompts, tp=1, dp=1, ep=1,
    )  # fmt: skip
    hardware = {**content.hardware, "worker": machine.as_hardware()}
    return replace(content, hardware=hardware, first=first, measured=points)


def _page(console: Console, content: PageContent, address: tuple[str, int] | None, path: Path | None) -> None:
    html = build_page(content)
    if path:
        with written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(html, encoding="utf-8")
        console.print(f"wrote {path} ({len(html) / 1000:.0f} kB); it needs no network and no server")
    if address:
        serve_page(html, *address, on_ready=lambda url: console.print(f"roofline at {url} (Ctrl-C ends)"))
