"""Time a family's cases, in processes of their own, each case's row as soon as it is known."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from headrace_kernels import use_backend

from tests.perf.in_turn import Limits, Lost, Send, in_turn
from tests.perf.kernels.bench_case import BenchCase, Calls, buffers_at_most
from tests.perf.kernels.ceilings import Ceilings
from tests.perf.kernels.harness import (
    families,
    family_modules,
    is_usable,
    measure_eager_us,
    measure_host_us,
    measure_us,
)
from tests.perf.kernels.peers import Adapter, load_adapters, peers_of
from tests.perf.kernels.rows import Row, fits_l2, unmeasured
from tests.perf.kernels.stand_in import InsteadOfCuda

PEERS = Path(__file__).parents[3] / ".peers"
# What a decode step takes most of its time for comes first: what a limit cuts off matters least.
FIRST = ("moe_experts", "mla_decode", "decode_linear", "moe_router", "mla_prologue", "causal_attention", "grouped_gemm")
_FIRST_SHAPES = ("V2-Lite", "H=16 ", "V3", "H=128")
# An interpreter takes a while even for these.
_DRY_CASES = 2

Measure = Callable[[Sequence[Callable[[], object]]], float]


@dataclass(frozen=True)
class How:
    """How to measure: with others' kernels or not; `is_dry`: interpreted on a CPU, where times mean nothing."""

    has_peers: bool = True
    is_dry: bool = False


def in_order(names: Iterable[str]) -> list[str]:
    """Return families in the order to measure them."""
    return sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def cases_of(family: str, how: How) -> list[BenchCase]:
    """Return a family's cases in the order to measure them: of the models that matter most first. Dry: the smallest."""
    cases = families("cases")[family]()
    if how.is_dry:
        return sorted(cases, key=lambda case: case.bytes_moved)[:_DRY_CASES]

    def place(case: BenchCase) -> int:
        return next((n for n, part in enumerate(_FIRST_SHAPES) if part in case.shape), len(_FIRST_SHAPES))

    return sorted(cases, key=place)


def measure_family(family: str, ceilings: Ceilings, how: How, limits: Limits) -> Generator[Row]:
    """Yield a row for each of a family's cases: one that hangs, crashes or comes too late says so."""
    cases = cases_of(family, how)
    work = partial(_measure_from, family, ceilings, how)
    preload = [*family_modules(), __name__]
    for case, found in zip(cases, in_turn(len(cases), work, limits, preload), strict=True):
        yield replace(unmeasured(case, ceilings), error=found.why) if isinstance(found, Lost) else found


def _measure_from(family: str, ceilings: Ceilings, how: How, first: int, send: Send) -> None:
    """Measure a family's cases from number `first` on, to the end or until this process can measure no more."""
    adapters = load_adapters(PEERS) if how.has_peers else []
    with device(how):
        for case in cases_of(family, how)[first:]:
            row = row_of(case, ceilings, how, adapters)
            send(row)
            has_failed = row.error or any(isinstance(time, str) for time in row.peers.values())
            if has_failed and not how.is_dry and not is_usable():
                return


@contextlib.contextmanager
def device(how: How) -> Generator[None]:
    """Have cases computed where they say, or interpreted on the CPU."""
    contexts: list[AbstractContextManager[object]] = []
    if how.is_dry:
        contexts = [InsteadOfCuda("cpu"), buffers_at_most(2), use_backend("triton")]
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def row_of(case: BenchCase, ceilings: Ceilings, how: How, adapters: Sequence[Adapter]) -> Row:
    """Measure a case and its peers."""
    empty = unmeasured(case, ceilings)
    in_graph, eager = (measure_host_us, measure_host_us) if how.is_dry else (measure_us, measure_eager_us)
    own, num_calls = _time(case.calls, in_graph)
    peers: dict[str, float | str] = {}
    if how.has_peers:
        peers |= {name: _time(calls, in_graph)[0] for name, calls in peers_of(case, adapters).items()}
        peers |= {name: _time(calls, eager)[0] for name, calls in case.eager_peers.items()}
    if isinstance(own, str):
        return replace(empty, error=own, peers=peers)
    l2_bytes = 0 if how.is_dry else torch.cuda.get_device_properties(0).L2_cache_size
    return replace(empty, us=own, peers=peers, is_in_l2=fits_l2(case, num_calls, l2_bytes, empty.bound))


def _time(make_calls: Calls, measure: Measure) -> tuple[float | str, int]:
    """Return the median time and the number of buffers; in place of the time, why there is none."""
    try:
        calls = make_calls()
        return measure(calls), len(calls)
    except Exception as error:  # noqa: BLE001 - one kernel or peer that fails must not cost the others' figures
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160], 0
    finally:
        torch.cuda.empty_cache()
