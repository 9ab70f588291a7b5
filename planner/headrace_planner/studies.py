"""Every study of the docs by its name: `headrace simulate --study NAME`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from headrace_planner.sim_attention import attention
from headrace_planner.sim_roles import roles
from headrace_planner.sim_studies import Study, disaggregation, dp_attention, experts, ratio
from headrace_planner.sim_workloads import workloads

STUDIES: Mapping[str, Callable[[Path | None], Study]] = {
    "attention": attention,
    "dp-attention": dp_attention,
    "experts": experts,
    "disaggregation": disaggregation,
    "ratio": ratio,
    "workloads": workloads,
    "roles": roles,
}
