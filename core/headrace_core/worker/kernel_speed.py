"""How near each backend's kernels come to the floor on this machine's CPU, family by family.

    python -m headrace_core.worker.kernel_speed    # what `headrace roofline --kernels` draws, as JSON

Floors are those of the roofline: bytes at the speed at which this machine reads memory now, or FLOPs at the speed at
which it multiplies large matrices now. Inputs of a case take turns, more of them than the caches hold. A backend that
can't run says why; kernels of GPUs are `make kernels-bench`'s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from headrace_kernels.backend import Backend, instruction_set, use_backend, what_is_missing
from headrace_kernels.dispatch import TABLE, objection

from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.hardware_measure import best_of, measure_cpu
from headrace_core.roofline.model_shape import Dtype
from headrace_core.worker.kernel_cases import Call, KernelCase, kernel_cases

BACKENDS: tuple[Backend, ...] = get_args(Backend)
_CACHE_BYTES = 96 << 20
_MOST_INPUTS = 16
_SQUARE = 1536
_SECONDS = 0.15
_LEAST_CALLS = 3


Found = dict[str, float | str]
"""Of a backend: median seconds "s", or why there are none, "not_measured"."""


def kernel_seconds(cases: Sequence[KernelCase]) -> list[dict[str, Found]]:
    """Return for each case what was found of each backend, by its name."""
    return [{name: _found(case, name) for name in BACKENDS} for case in cases]


def beside_floors(
    cases: Sequence[KernelCase], found: Sequence[dict[str, Found]], hardware: Hardware
) -> list[dict[str, Any]]:
    """Return each case's floor, what bounds it, and by backend what was found and its "share" of the floor's rate."""
    rows: list[dict[str, Any]] = []
    for case, backends in zip(cases, found, strict=True):
        memory_s = case.num_bytes / hardware.memory_bytes_per_s
        compute_s = case.flops / hardware.flops_per_s(Dtype.BF16)
        floor_s, bound = max((memory_s, "memory"), (compute_s, "compute"))
        shares = {name: each | _share(floor_s, each.get("s")) for name, each in backends.items()}
        rows.append(
            {"family": case.family, "shape": case.shape, "floor_s": floor_s, "bound": bound, "backends": shares}
        )
    return rows


def _share(floor_s: float, seconds: float | str | None) -> Found:
    return {"share": floor_s / seconds} if isinstance(seconds, float) else {}


def reason(family: str, name: Backend) -> str | None:
    """Return why `family` can't be measured on `name` here; None: it can."""
    if name not in TABLE[family] and any(name in row for row in TABLE.values()):
        return "the family has no kernel of it"
    return what_is_missing(name) or objection(name, "cpu")


def measured_hardware() -> Hardware:
    """Return what this machine's CPU does now; products in the faster of float32 and, if it has that, bfloat16."""
    hardware = measure_cpu()
    flops = max(hardware.flops.values())
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        square = torch.randn(_SQUARE, _SQUARE).bfloat16()
        flops = max(flops, 2 * _SQUARE**3 / best_of(lambda: square @ square, 3))
    return replace(hardware, flops={Dtype.BF16: flops})


def faster_of(one: Hardware, other: Hardware) -> Hardware:
    """Return the most of two measurements: where others use the machine, the nearest to the truth."""
    return replace(
        one,
        flops={dtype: max(flops, other.flops[dtype]) for dtype, flops in one.flops.items()},
        memory_bytes_per_s=max(one.memory_bytes_per_s, other.memory_bytes_per_s),
    )


def _found(case: KernelCase, name: Backend) -> Found:
    why_not = reason(case.family, name)
    return {"not_measured": why_not} if why_not else {"s": statistics.median(_seconds(case, name))}


def _seconds(case: KernelCase, name: Backend) -> list[float]:
    with use_backend(name), torch.inference_mode():
        count = max(2, min(_MOST_INPUTS, int(_CACHE_BYTES / case.num_bytes)))
        calls: list[Call] = [case.make() for _ in range(count)]
        for call in calls:
            call()
        found: list[float] = []
        begin = time.perf_counter()
        while len(found) < _LEAST_CALLS or time.perf_counter() - begin < _SECONDS:
            before = time.perf_counter()
            calls[len(found) % count]()
            found.append(time.perf_counter() - before)
    return found


def main() -> None:
    """Print the report of all families, or of those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="default: all")
    options = parser.parse_args()
    cases = [case for case in kernel_cases() if not options.family or case.family in options.family]
    if not cases:
        sys.exit(f"there are cases of {', '.join(dict.fromkeys(case.family for case in kernel_cases()))} alone")
    before = measured_hardware()
    found = kernel_seconds(cases)
    hardware = faster_of(before, measured_hardware())
    report = {
        "threads": torch.get_num_threads(),
        "isa": instruction_set(),
        "bytes_per_s": hardware.memory_bytes_per_s,
        "flops_per_s": hardware.flops_per_s(Dtype.BF16),
        "cases": beside_floors(cases, found, hardware),
    }
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
