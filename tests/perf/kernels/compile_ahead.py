"""Compile what cases launch, each in a process of its own, several at a time; no GPU is used.

    python -m tests.perf.kernels.compile_ahead [--family NAME]... [--jobs N] [--seconds N] [--json PATH]

Launches are recorded on meta tensors and compiled as `headrace_kernels.aot` does, for sm_90 (gfx942 with a torch for
ROCm). What is compiled stays in Triton's cache, where a process that measures on such a GPU finds it. A launch that the
compiler hangs or crashes at is cut off and named; each has a line in the report as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal

from headrace_kernels import use_backend
from headrace_kernels.aot.compile import Compiled, compile_launch
from headrace_kernels.aot.launches import specialise
from headrace_kernels.gpu.configs import Config, asking, use_config
from headrace_kernels.gpu.launch import Launch, recording, target
from rich.console import Console

from tests.perf.in_turn import Limits, Lost, Send, in_turn
from tests.perf.kernels.bench_case import BenchCase, buffers_at_most
from tests.perf.kernels.harness import families, family_modules
from tests.perf.kernels.stand_in import InsteadOfCuda

_EACH_S = 60.0

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Job:
    """One launch, by where a process finds it again: the `launch`-th of a case of `cases()` or of `tuning()`.

    `config`, for a tuning case, is the candidate that its key gets.
    """

    attribute: Literal["cases", "tuning"]
    family: str
    case: int
    launch: int
    config: tuple[tuple[str, int], ...] | None = None

    def __str__(self) -> str:
        listed = _listed(self.attribute, self.family)[self.case]
        if self.attribute == "cases":
            return f"{self.family} {listed.shape}, launch {self.launch}"
        return f"{self.family} {listed[1]} {dict(self.config or ())}, launch {self.launch}"


def main() -> int:
    """Compile what the options name; return 0, 1 if a launch does not compile or no time was left for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = families("cases")
    parser.add_argument("--family", choices=sorted(known), action="append", help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: CPUs)")
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no launch after so many")
    parser.add_argument("--json", type=Path, metavar="PATH", help="append a line for each launch there")
    options = parser.parse_args()
    limits = Limits.begin(_EACH_S, options.seconds)
    num_bad = 0
    for job, found in compile_all(jobs_of_cases(options.family or known), options.jobs, limits):
        bad = trouble(found)
        num_bad += bool(bad)
        told = {} if isinstance(found, Lost) else asdict(found)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps({"launch": str(job), **told, "problems": bad}) + "\n")
        console.print(f"{job}: {'; '.join(bad) or f'{found.seconds:.1f} s'}", markup=False)
    return 1 if num_bad else 0


def trouble(found: Compiled | Lost) -> tuple[str, ...]:
    """Return what is wrong with a launch, in words; empty if it compiled within the GPU's limits."""
    return (found.why,) if isinstance(found, Lost) else found.problems


def record(case: BenchCase) -> list[Launch]:
    """Return what making a case's inputs and its first call launch."""
    with InsteadOfCuda("meta"), buffers_at_most(1), use_backend("triton"), recording(target()) as launches:
        case.calls()[0]()
    return launches


def asked_by(case: BenchCase) -> dict[tuple[str, str], Config]:
    """Return the configurations that a case's launches ask for: the defaults by family and key."""
    with asking() as asked:
        record(case)
    return asked


def jobs_of_cases(names: Iterable[str]) -> list[Job]:
    """Return each different launch of the families' cases once."""
    first: dict[str, Job] = {}
    for name in names:
        for index in range(len(_listed("cases", name))):
            for launch in range(len(_recorded("cases", name, index, None))):
                job = Job("cases", name, index, launch)
                first.setdefault(key_of(job), job)
    return list(first.values())


def jobs_of_candidate(family: str, index: int, candidate: Config) -> list[Job]:
    """Return the launches of a tuning case with a candidate for its key."""
    config = tuple(sorted(candidate.items()))
    return [
        Job("tuning", family, index, launch, config)
        for launch in range(len(_recorded("tuning", family, index, config)))
    ]


def key_of(job: Job) -> str:
    """Return what names a job's machine code; what does not bind has a name of its own: compiling it says why."""
    try:
        return specialise(_launch(job), target()).key
    except Exception:  # noqa: BLE001 - whatever Triton says of wrong arguments, compiling says again
        return repr(job)


def compile_all(jobs: Sequence[Job], num_processes: int, limits: Limits) -> Generator[tuple[Job, Compiled | Lost]]:
    """Yield what compiling each job finds, as soon as it is known."""
    found: SimpleQueue[tuple[Job, Compiled | Lost]] = SimpleQueue()
    shares = [jobs[first::num_processes] for first in range(num_processes)]
    threads = [Thread(target=_compile_share, args=(share, limits, found.put), daemon=True) for share in shares]
    for thread in threads:
        thread.start()
    for _ in jobs:
        yield found.get()


def _compile_share(share: Sequence[Job], limits: Limits, put: Callable[[tuple[Job, Compiled | Lost]], None]) -> None:
    preload = [*family_modules(), "headrace_kernels.aot.compile"]
    for job, result in zip(share, in_turn(len(share), partial(_compile_from, share), limits, preload), strict=True):
        put((job, result))


def _compile_from(share: Sequence[Job], first: int, send: Send) -> None:
    for job in share[first:]:
        send(compile_launch(_launch(job), target()))


def _launch(job: Job) -> Launch:
    return _recorded(job.attribute, job.family, job.case, job.config)[job.launch]


@cache
def _recorded(attribute: str, family: str, case: int, config: tuple[tuple[str, int], ...] | None) -> list[Launch]:
    listed = _listed(attribute, family)[case]
    if config is None:
        return record(listed)
    with use_config(family, dict(config), listed[1]):
        return record(listed[3])


@cache
def _listed(attribute: str, family: str) -> list[Any]:
    return families(attribute)[family]()


if __name__ == "__main__":
    sys.exit(main())
