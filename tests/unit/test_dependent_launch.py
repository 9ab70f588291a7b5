"""Kernels that start while the one before them runs: none may touch global memory before it has waited."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from headrace_kernels.aot.launches import TARGETS, cases, find_families, recorded, specialise
from headrace_kernels.gpu import dependent_launch
from headrace_kernels.gpu.dependent_launch import wait_for_earlier
from headrace_kernels.gpu.launch import Launch, recording
from triton.runtime.jit import JITFunction

_ACCESS = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?(?:(?:ld|st|atom|red)\.\S*global|cp\.async\.c|cp\.async\.bulk)", re.MULTILINE
)


def dependent_launches():
    """One launch of each kernel that the AOT cases launch so; the router's among the rest."""
    found = {}
    for family in find_families():
        for index in range(len(cases(family))):
            for launch in recorded(family, index, "cuda"):
                if launch.constants.get("IS_DEPENDENT"):
                    found.setdefault(launch.kernel.__name__, launch)
    return found


LAUNCHES = dependent_launches()


def accesses_before_the_wait(launch):
    specialised = specialise(launch, "cuda")
    compiled = triton.compile(specialised.source, target=TARGETS["cuda"], options=specialised.options)
    assert compiled.metadata.launch_pdl
    ptx = compiled.asm["ptx"]
    assert ptx.count("griddepcontrol.wait") == 1
    assert _ACCESS.search(ptx)
    return _ACCESS.findall(ptx[: ptx.index("griddepcontrol.wait")])


@pytest.mark.parametrize("kernel", sorted(LAUNCHES))
def test_a_kernel_waits_before_it_touches_memory(kernel):
    assert accesses_before_the_wait(LAUNCHES[kernel]) == []


def _hasty_kernel(x_ptr, y_ptr, IS_DEPENDENT: tl.constexpr):
    x = tl.load(x_ptr)
    wait_for_earlier()
    tl.store(y_ptr, x)


def test_one_that_did_not_would_be_found():
    x = torch.empty(8, device="meta")
    constants = {"IS_DEPENDENT": True, "launch_pdl": True}
    assert accesses_before_the_wait(Launch(JITFunction(_hasty_kernel), (1,), (x, x), constants, 4, 2))


def test_the_kernels_of_a_layer_start_early_but_for_the_router_whose_counters_are_shared():
    assert "_router_kernel" not in LAUNCHES
    assert {"_linear_kernel", "_mla_prologue_kernel", "_mla_decode_kernel", "_combine_values_kernel"} <= set(LAUNCHES)
    assert {"_few_gate_up_kernel", "_few_down_kernel", "_expert_gemm_kernel", "_combine_kernel"} <= set(LAUNCHES)


def test_only_where_the_gpu_has_it_and_it_is_on(monkeypatch):
    x = torch.empty(1, device="meta")
    with recording("cuda"):
        assert dependent_launch.dependent_launch(x) == {"IS_DEPENDENT": True, "launch_pdl": True}
        monkeypatch.setattr(dependent_launch, "IS_ON", False)
        assert dependent_launch.dependent_launch(x) == {"IS_DEPENDENT": False}
    monkeypatch.undo()
    with recording("hip"):
        assert dependent_launch.dependent_launch(x) == {"IS_DEPENDENT": False}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dependent_launch.dependent_launch(x) == {"IS_DEPENDENT": False}
