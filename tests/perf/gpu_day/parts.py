"""What a day with a GPU consists of: the commands of each part, and their shares of the time."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.perf.kernels import parity

LIMIT = "{limit}"
"""Where a command is told how many seconds it has, to end by itself with what it found."""

# Five kernels of a decode step and the one of a prefill, as the profiler sees them: its counters, not its times.
_PROFILED = (
    "moe_router:V2-Lite T=1",
    "moe_experts:V2-Lite 16 bit T=1,",
    "mla_decode:H=16 B=128 context=4096 bf16",
    "mla_decode:H=128 B=128 context=4096 bf16",
    "causal_attention:V3 S=4096",
)
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
_PROFILED_KERNELS = "regex:_router_kernel|_few_.*|_mla_decode_kernel|_attend_kernel"
_DRY_FAMILIES = ("rms_norm", "moe_routing")
_DRY_PARITY = ("tests/parity/kernels/test_rms_norm.py",)
_DRY_TUNE = ("mla_prologue:H=16 bfloat16",)
_ONE_THREAD = (("OMP_NUM_THREADS", "1"),)


@dataclass(frozen=True)
class Part:
    """One command. Of the time that is left it may take `weight` of the sum of its own weight and the later parts'.

    `log` is the file below the output folder that its lines are appended to, `environment` what it gets besides.
    `missing` says why it cannot run on this machine, empty if it can.
    """

    name: str
    weight: float
    command: tuple[str, ...]
    log: str
    environment: tuple[tuple[str, str], ...] = ()
    missing: str = ""


Stage = tuple[Part, ...]
"""Parts that run at the same time, in the time of the first."""


@dataclass(frozen=True)
class Choice:
    """What is asked for: families to measure (none: all), parity tests to run, FAMILY or FAMILY:KEY to tune.

    `is_dry`: on a CPU, where nothing means all no more, but what an interpreter has done soon.
    """

    families: Sequence[str] = ()
    tests: Sequence[str] = ()
    tune: Sequence[str] = ()
    is_dry: bool = False

    @staticmethod
    def dry(families: Sequence[str], tests: Sequence[str], tune: Sequence[str]) -> Choice:
        """Return what to try on a CPU: the quickest of each kind where none is chosen, and tuning if nothing is."""
        is_open = not (families or tests or tune)
        return Choice(families or _DRY_FAMILIES, tests or _DRY_PARITY, _DRY_TUNE if is_open else tune, is_dry=True)


def first(out: Path, choice: Choice) -> list[Stage]:
    """Return what shows most: parity while the compiler warms up, a decode step, every kernel, tokens, counters."""
    num_tests = max(_num_cpus() * 2 // 3, 1)
    tests = choice.tests or ("tests/parity/kernels",)
    return [
        (_parity(out, tests, num_tests), _compile(out, choice, max(_num_cpus() - num_tests, 1))),
        (_engine("step", 23, out, choice),),
        (_kernels(out, choice, has_peers=False),),
        (_engine("tokens", 11, out, choice),),
        (_profile(choice),),
    ]


def second(out: Path, choice: Choice) -> list[Stage]:
    """Return what a first run asks for: chosen tests again, chosen kernels beside others', tuning."""
    stages: list[Stage] = [(_parity(out, choice.tests, _num_cpus()),)] if choice.tests else []
    stages.append((_kernels(out, choice, has_peers=True),))
    return stages + [(_tune(wanted, out, choice),) for wanted in choice.tune]


def _num_cpus() -> int:
    return os.cpu_count() or 1


def _python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *map(str, arguments))


def _parity(out: Path, tests: Sequence[str], processes: int) -> Part:
    command = parity.command(tests, out / "parity.jsonl", processes)
    return Part("parity", 27, tuple(command), "parity.log", _ONE_THREAD)


def _compile(out: Path, choice: Choice, processes: int) -> Part:
    options = ["--jobs", processes, "--seconds", LIMIT, "--json", out / "compile.jsonl", *_families(choice)]
    return Part("compile", 27, _python("tests.perf.kernels.compile_ahead", *options), "compile.log", _ONE_THREAD)


def _engine(name: str, weight: float, out: Path, choice: Choice) -> Part:
    dry = ["--device", "cpu", "--shape", "tiny"] if choice.is_dry else []
    options = ["--part", name, "--json", out / "engine.json", *dry]
    return Part(name, weight, _python("tests.perf.gpu_engine", *options), "engine.log")


def _kernels(out: Path, choice: Choice, *, has_peers: bool) -> Part:
    options = ["--no-parity", "--seconds", LIMIT, "--json", out / "kernels.json", *_families(choice)]
    options += [] if has_peers else ["--no-peers"]
    options += ["--dry-run"] if choice.is_dry else []
    return Part("kernels", 30, _python("tests.perf.kernels.report", *options), "kernels.log")


def _families(choice: Choice) -> list[str]:
    return [argument for family in choice.families for argument in ("--family", family)]


def _profile(choice: Choice) -> Part:
    calls = ("--dry-run", f"{_DRY_FAMILIES[0]}:T=1") if choice.is_dry else _PROFILED
    command = _python("tests.perf.gpu_day.one_call", *calls)
    if choice.is_dry:
        return Part("profile", 9, command, "profile.log")
    sections = [argument for section in _SECTIONS for argument in ("--section", section)]
    profiler = ("ncu", "--clock-control", "none", "-k", _PROFILED_KERNELS, "-c", "15", *sections)
    missing = "" if shutil.which("ncu") else "ncu, NVIDIA's profiler, is not on this machine's PATH"
    return Part("profile", 9, (*profiler, *command), "profile.log", missing=missing)


def _tune(wanted: str, out: Path, choice: Choice) -> Part:
    family, _, key = wanted.partition(":")
    options = ["--family", family, "--seconds", LIMIT, "--json", out / "tuned.json", *(["--key", key] if key else [])]
    options += ["--dry-run"] if choice.is_dry else []
    return Part(f"tune {wanted}", 30, _python("tests.perf.kernels.tune", *options), "tune.log")
