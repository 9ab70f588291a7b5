"""Which module computes a kernel family: the table of families and backends, and the look-up.

A backend's modules lie in a folder of its own, one a family, with the functions of the family's entry. They import what
they like of the entries; an entry finds them here alone, by name, so that no import leads back.

Such a module takes all arguments that the entry lets pass. Shapes or dtypes that its kernel does not take it hands to
`reference` itself; what it has no use for (planned slots on a GPU) it leaves.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from torch import Tensor

from headrace_kernels.backend import Backend, backend, what_is_missing

TABLE: dict[str, tuple[Backend, ...]] = {
    "act_quant": ("reference", "triton"),
    "causal_attention": ("reference", "triton"),
    "decode_linear": ("reference", "triton"),
    "experts": ("reference", "cpu", "triton"),
    "fp8_experts": ("reference", "cpu", "triton"),
    "fp8_linear": ("reference", "cpu", "triton"),
    "gqa_decode": ("reference", "cpu", "triton"),
    "gqa_prefill": ("reference", "cpu", "triton"),
    "grouped_gemm": ("reference", "triton"),
    "int8_experts": ("reference", "cpu"),
    "int8_linear": ("reference", "cpu"),
    "latent_load": ("reference", "triton"),
    "latent_store": ("reference", "cpu", "triton"),
    "linear": ("reference", "cpu", "triton"),
    "mla_decode": ("reference", "cpu", "triton"),
    "mla_decode_values": ("reference", "cpu", "triton"),
    "mla_prefill": ("reference", "cpu", "triton"),
    "mla_prologue": ("reference", "cpu", "triton"),
    "moe_experts": ("reference", "triton"),
    "moe_router": ("reference", "cpu", "triton"),
    "moe_routing": ("reference", "triton"),
    "moe_sort": ("reference", "triton"),
    "packed_experts": ("reference",),
    "page_copy": ("reference", "triton"),
    "rms_norm": ("reference", "cpu", "triton"),
    "rope": ("reference", "cpu", "triton"),
    "sampling": ("reference", "cpu", "triton"),
    "silu_mul": ("reference", "cpu"),
    "split_plan": ("reference", "triton"),
}
"""The backends that each family has kernels on; no family has one of aiter's yet, none was measured."""

FOLDERS: dict[Backend, str] = {"reference": "reference", "cpu": "cpu", "triton": "gpu", "aiter": "aiter"}

_NEXT_BEST: dict[Backend, Backend] = {"aiter": "triton", "triton": "reference", "cpu": "reference"}
_DEVICES: dict[Backend, tuple[str, ...]] = {
    "reference": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "triton": ("cuda",),
    "aiter": ("cuda",),
}


def select(family: str, tensor: Tensor) -> ModuleType:
    """Return the module that computes `family` for `tensor`, imported when it is first asked for."""
    return _module(family, backend(tensor))


def backend_of(family: str, tensor: Tensor) -> Backend:
    """Return what `family` runs on for `tensor`: its backend, or the next best that the family has kernels on."""
    return _best(family, backend(tensor))


def objection(name: Backend, device: str) -> str | None:
    """Return what speaks against computing with the kernels of `name` on `device`, "cpu" or "cuda"; None: nothing."""
    if device not in _DEVICES[name]:
        return f"they run on {' and '.join(_DEVICES[name])}"
    missing = what_is_missing(name)
    if missing:
        return missing
    return None if any(name in row for row in TABLE.values()) else "no kernel family has one of them"


def _best(family: str, name: Backend) -> Backend:
    while name not in TABLE[family]:
        name = _NEXT_BEST[name]
    return name


# Asked at every call of a kernel.
@cache
def _module(family: str, name: Backend) -> ModuleType:
    return import_module(f"headrace_kernels.{FOLDERS[_best(family, name)]}.{family}")
