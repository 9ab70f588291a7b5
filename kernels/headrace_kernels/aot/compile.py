"""Compile recorded launches, in several processes, and read what they take."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.compiler import make_backend

from headrace_kernels.aot.launches import TARGETS, Job, Specialised, recorded, specialise
from headrace_kernels.aot.resources import (
    Resources,
    amd_excess,
    amdgcn_resources,
    cubin_usage,
    cuda_excess,
    ptx_matrix_units,
    ptxas_serialised,
    ptxas_spilled_bytes,
)
from headrace_kernels.gpu.launch import Launch, Target

_CRASHED = "the compiler crashed, without an exception: look above for what it printed"


@dataclass(frozen=True, slots=True)
class Compiled:
    """How the compilation of a job ended: `resources` if it compiled, and what is wrong, in words."""

    resources: Resources | None
    problems: tuple[str, ...]
    seconds: float
    from_cache: bool


def compile_job(job: Job) -> Compiled:
    """Compile the launch of a job: `compile_launch`."""
    return compile_launch(recorded(job.family, job.case, job.target)[job.launch], job.target)


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile one launch for `target`; what the compiler raises is a problem of that launch.

    Raises:
        ValueError: a tool that reads the machine code says something else than it did.
    """
    cache_hits: list[bool] = []

    def listen(*, cache_hit: bool, **_: Any) -> None:
        cache_hits.append(cache_hit)

    knobs.compilation.listener = listen
    began_s = time.monotonic()
    try:
        specialised = specialise(launch, target)
        kernel, log = _compile(specialised, target)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises, the other launches still compile
        return Compiled(None, (f"does not compile: {_gist(error)}",), time.monotonic() - began_s, False)
    seconds, from_cache = time.monotonic() - began_s, all(cache_hits)
    if target == "cuda":
        resources = _cuda_resources(kernel, specialised, log)
        problems = cuda_excess(resources, launch.num_warps)
    else:
        resources = amdgcn_resources(kernel.asm["amdgcn"], kernel.metadata.shared)
        problems = amd_excess(resources, launch.num_warps)
    return Compiled(resources, tuple(problems), seconds, from_cache)


def _gist(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) <= 1500 else f"{text[:500]} [...] {text[-900:]}"


def _cuda_resources(kernel: Any, specialised: Specialised, log: str) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    registers, stack_bytes, static_shared = cubin_usage(usage)
    matrix_units = ptx_matrix_units(kernel.asm["ptx"])
    spilled_bytes, serialised = 0, ""
    if stack_bytes or matrix_units == "wgmma":
        # Only ptxas knows whether a stack holds spills, and whether wgmma instructions can overlap.
        log = _whole_log(kernel, specialised, log)
        spilled_bytes, serialised = ptxas_spilled_bytes(log), ptxas_serialised(log)
    return Resources(
        registers=registers,
        spilled_bytes=spilled_bytes,
        shared_bytes=max(kernel.metadata.shared, static_shared),
        matrix_units=matrix_units,
        serialised=serialised,
    )


def _whole_log(kernel: Any, specialised: Specialised, log: str) -> str:
    """Return ptxas's log; if the kernel comes from the cache, which does not keep it, by running ptxas again."""
    if "spill stores" in log:
        return log
    backend: Any = make_backend(TARGETS["cuda"])
    options = backend.parse_options(specialised.options)
    return _logged(backend.make_cubin, kernel.asm["ptx"], {}, options, TARGETS["cuda"].arch)[1]


def _compile(specialised: Specialised, target: Target) -> tuple[Any, str]:
    """Return the compiled kernel and what Triton printed: ptxas's log, and on an error the whole PTX."""
    return _logged(triton.compile, specialised.source, target=TARGETS[target], options=specialised.options)


def _logged(run: Callable[..., Any], *arguments: Any, **keywords: Any) -> tuple[Any, str]:
    log = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        result = run(*arguments, **keywords)
    return result, log.getvalue()


def compile_all(jobs: Iterable[Job], num_processes: int, finished: Callable[[], None]) -> dict[Job, Compiled]:
    """Compile every job in `num_processes` processes; `finished` is called after each.

    A job that makes the compiler abort takes its process along, and with it what the others were doing: these jobs
    are tried again, each alone, so that the one to blame is named.
    """
    results: dict[Job, Compiled] = {}
    again: list[Job] = []
    with _pool(num_processes) as pool:
        futures = {pool.submit(compile_job, job): job for job in jobs}
        for future in as_completed(futures):
            try:
                results[futures[future]] = future.result()
                finished()
            except BrokenProcessPool:
                again.append(futures[future])
    for job in again:
        with _pool(1) as pool:
            try:
                results[job] = pool.submit(compile_job, job).result()
            except BrokenProcessPool:
                results[job] = Compiled(None, (_CRASHED,), 0.0, False)
        finished()
    return results


def _pool(num_processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn"))
