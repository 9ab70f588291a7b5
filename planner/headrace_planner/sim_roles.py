"""The study of roles: workers that prefill or decode as the load asks, beside every fixed ratio, on a changing mix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from headrace_core.roofline.communication import Parallelism

from headrace_planner.plots import Figure, Line
from headrace_planner.sim_capacity import wire_of
from headrace_planner.sim_config import SimConfig
from headrace_planner.sim_result import SimResult, Slo
from headrace_planner.sim_studies import Study, node, spec
from headrace_planner.simulator import simulate
from headrace_planner.workload import Phase, changing

_NODES = 6
_SLO = Slo(ttft_s=2.0, itl_s=0.05)
_PHASES = (Phase(40, 80, 4096, 128), Phase(40, 50, 512, 2048))
_STEP_TOKENS = 8192
"""Prompt tokens of a step that others' answers wait for."""


def roles(_: Path | None) -> Study:
    """Six nodes: fixed prefill and decode ones, or some prefill ones beside those of both roles."""
    machine = node(Parallelism(1, 8, 8))
    worker, mixed, wire = spec(machine), spec(machine, step_tokens=_STEP_TOKENS), wire_of(machine)
    workload = changing(_PHASES * 2)
    rows: list[list[str]] = []
    lines: list[Line] = []
    counts = {"decode": range(2, _NODES), "both": range(_NODES)}
    for kind, prefills in counts.items():
        met: list[float] = []
        for num_prefill in prefills:
            others = _NODES - num_prefill
            if kind == "decode":
                config = SimConfig(worker, worker, None, num_prefill, others, wire=wire, fidelity="fast")
            else:
                config = SimConfig(worker, None, mixed, num_prefill, 0, others, wire=wire, fidelity="fast")
            result = simulate(config, workload)
            met.append(result.attainment(_SLO))
            rows.append([f"{num_prefill} prefill + {others} {kind}", f"{met[-1]:.1%}", *_percentiles(result)])
        lines.append(Line(f"prefill + {kind}", list(prefills), met))
    title = f"TTFT <= {_SLO.ttft_s:g} s and TPOT <= {_SLO.itl_s * 1e3:g} ms, 6 nodes of 8 H200, a mix that changes"
    figure = Figure(title, "prefill nodes of 6", "met both objectives", lines)
    return Study([figure], ["nodes", "met both", "TTFT p50, s", "p99", "TPOT p50, ms", "p99"], rows)


def _percentiles(result: SimResult) -> list[str]:
    ttft_s = [f"{np.nanpercentile(result.ttft_s, percent):.2f}" for percent in (50, 99)]
    return [*ttft_s, *(f"{1e3 * np.nanpercentile(result.tpot_s, percent):.1f}" for percent in (50, 99))]
