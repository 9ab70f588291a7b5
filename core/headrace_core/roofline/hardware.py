"""What a machine can do at best: peaks, bandwidths, memory, price. A table, and files that extend it.

Peaks are the vendors' dense figures, never the sparse ones, and in FP32 those without TF32's shorter numbers; no kernel
reaches them, and a fraction to expect of them is for whoever predicts (`Hardware.derated`). Prices are assumptions for
comparing, to be replaced by one's own.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headrace_core.roofline.model_shape import Dtype


class HardwareError(ValueError):
    """A hardware name is unknown, or a file of hardware can't be used."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator and what connects it to others.

    `link` is what joins the `link_domain` accelerators of a node (NVLink, ICI), `network` what joins nodes; both per
    accelerator and per direction. `operation_overhead_s` is added for each operation: what starting it costs.
    `collective_start_s` is what each collective costs besides, `link_hop_s` and `network_hop_s` each of its hops,
    however few bytes it moves.
    """

    name: str
    flops: Mapping[Dtype, float]
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    cost_per_hour: float
    source: str
    link_domain: int = 8
    operation_overhead_s: float = 0.0
    collective_start_s: float = 0.0
    link_hop_s: float = 0.0
    network_hop_s: float = 0.0

    def flops_per_s(self, dtype: Dtype) -> float:
        """Return the peak for `dtype`, or for the widest narrower use of it that the machine has: FP8 runs as BF16."""
        for candidate in (dtype, Dtype.BF16, Dtype.FP16, Dtype.FP32):
            if candidate in self.flops:
                return self.flops[candidate]
        return max(self.flops.values())

    def critical_intensity(self, dtype: Dtype = Dtype.BF16) -> float:
        """Return the FLOPs per byte below which an operation is bound by memory."""
        return self.flops_per_s(dtype) / self.memory_bytes_per_s

    def derated(
        self, *, flops: float = 1.0, memory: float = 1.0, link: float = 1.0, operation_overhead_s: float | None = None
    ) -> Hardware:
        """Return this hardware with fractions of its peaks, as fitted from measurements."""
        return replace(
            self,
            flops={dtype: peak * flops for dtype, peak in self.flops.items()},
            memory_bytes_per_s=self.memory_bytes_per_s * memory,
            link_bytes_per_s=self.link_bytes_per_s * link,
            network_bytes_per_s=self.network_bytes_per_s * link,
            operation_overhead_s=self.operation_overhead_s if operation_overhead_s is None else operation_overhead_s,
        )


def _tpu(name: str, bf16: float, memory: float, gigabytes: float, link: float, network: float, cost: float) -> Hardware:
    # 256 chips of a pod are joined by ICI; v5p's pods are larger still.
    source = (
        "cloud.google.com/tpu/docs (peak, HBM, ICI); memory bandwidth as the MoE-intensity page has it; ICI one way, "
        "links summed, and DCN per chip: host NICs / chips; 1 us a hop of ICI (jax-ml.github.io/scaling-book), none of "
        "DCN; on-demand list price"
    )
    flops = {Dtype.BF16: bf16}
    return Hardware(name, flops, memory, gigabytes * 1e9, link, network, cost, source, link_domain=256, link_hop_s=1e-6)


# What the libraries themselves reckon with to choose an algorithm: seconds to start, of a hop inside a node, of one
# between nodes. NCCL's src/graph/tuning.cc, baseLat and hwLat; RCCL's of the same name. Others' may be faster.
_NCCL = ("NCCL", 6.6e-6, 0.6e-6, 2.7e-6)
_RCCL = ("RCCL", 12e-6, 0.8e-6, 9.5e-6)


def _gpu(
    name: str, fp32: float, bf16: float, fp8: float | None, memory: float, gigabytes: float, link: float,
    network: float, cost: float, source: str, latency: tuple[str, float, float, float] = _NCCL,
) -> Hardware:  # fmt: skip
    flops = {Dtype.FP32: fp32, Dtype.BF16: bf16, Dtype.FP16: bf16} | ({Dtype.FP8: fp8} if fp8 else {})
    library, start, hop, network_hop = latency
    source = f"{source}; latency of collectives: {library}'s tuning model, LL in a ring; price assumed"
    return Hardware(
        name, flops, memory, gigabytes * 1e9, link, network, cost, source,
        collective_start_s=start, link_hop_s=hop, network_hop_s=network_hop,
    )  # fmt: skip


_TABLE = (
    _tpu("tpu-v5e", 1.97e14, 8.2e11, 16, 2e11, 3.1e9, 1.20),
    _tpu("tpu-v5p", 4.59e14, 2.765e12, 95, 6e11, 6.2e9, 4.20),
    _tpu("tpu-v6e", 9.18e14, 1.6e12, 32, 4e11, 12.5e9, 2.70),
    _gpu("a100", 19.5e12, 312e12, None, 2.039e12, 80, 300e9, 25e9, 1.80,
         "NVIDIA A100 80GB SXM data sheet; NVLink 3 600 GB/s both ways; 200 Gb/s NIC"),
    _gpu("h100", 67e12, 989.5e12, 1979e12, 3.35e12, 80, 450e9, 50e9, 2.95,
         "NVIDIA H100 SXM data sheet; NVLink 4 900 GB/s both ways; 400 Gb/s NIC"),
    _gpu("h200", 67e12, 989.5e12, 1979e12, 4.8e12, 141, 450e9, 50e9, 3.50,
         "NVIDIA H200 SXM data sheet; NVLink 4 900 GB/s both ways; 400 Gb/s NIC"),
    _gpu("h200-attainable", 67e12, 790e12, 1480e12, 4.3e12, 141, 450e9, 50e9, 3.50,
         "what good kernels reach on an H200 of long GEMMs and streams; third-party figures, docs/roofline.md"),
    _gpu("b200", 75e12, 2.25e15, 4.5e15, 8e12, 180, 900e9, 50e9, 5.00,
         "NVIDIA DGX B200 data sheet; NVLink 5 1.8 TB/s both ways; 400 Gb/s NIC"),
    _gpu("mi300x", 163.4e12, 1307.4e12, 2614.9e12, 5.3e12, 192, 448e9, 50e9, 2.50,
         "AMD MI300X data sheet; 7 Infinity Fabric links of 64 GB/s one way; 400 Gb/s NIC", _RCCL),
    _gpu("mi355x", 157.3e12, 2.5e15, 5.0e15, 8e12, 288, 537e9, 50e9, 4.00,
         "AMD MI355X data sheet; 7 Infinity Fabric links of 76.8 GB/s one way; 400 Gb/s NIC", _RCCL),
)  # fmt: skip

HARDWARE = {hardware.name: hardware for hardware in _TABLE}
"""Accelerators by name. The CPU this runs on is `hardware_measure.measure_cpu()`."""


class _HardwareFile(BaseModel):
    """One entry of a file; what it leaves out comes from the entry of `HARDWARE` that `base` names."""

    model_config = ConfigDict(extra="forbid")

    base: str | None = None
    flops: dict[Dtype, float] | None = Field(default=None, min_length=1)
    memory_bytes_per_s: float | None = Field(default=None, gt=0)
    memory_bytes: float | None = Field(default=None, gt=0)
    link_bytes_per_s: float | None = Field(default=None, gt=0)
    network_bytes_per_s: float | None = Field(default=None, gt=0)
    cost_per_hour: float | None = Field(default=None, ge=0)
    source: str | None = None
    link_domain: int | None = Field(default=None, ge=1)
    operation_overhead_s: float | None = Field(default=None, ge=0)
    collective_start_s: float | None = Field(default=None, ge=0)
    link_hop_s: float | None = Field(default=None, ge=0)
    network_hop_s: float | None = Field(default=None, ge=0)


# What an entry without `base` may leave out.
_DEFAULTS: dict[str, Any] = {"cost_per_hour": 0.0, "link_domain": 8} | dict.fromkeys(
    ("operation_overhead_s", "collective_start_s", "link_hop_s", "network_hop_s"), 0.0
)


def load_hardware(path: Path) -> dict[str, Hardware]:
    """Read hardware from a TOML or JSON file: one table per name with `Hardware`'s fields, or `base` and what differs.

    Raises:
        HardwareError: Naming the file, the entry and the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
        entries: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise HardwareError(
            f"{path} can't be read as {'JSON' if path.suffix == '.json' else 'TOML'}: {error}"
        ) from None
    if not isinstance(entries, dict):
        raise HardwareError(f"{path} must hold a table of hardware by name")
    return {str(name): _parse(str(name), entry, path) for name, entry in cast("dict[Any, Any]", entries).items()}


def _parse(name: str, entry: Any, path: Path) -> Hardware:
    try:
        given = _HardwareFile.model_validate(entry).model_dump(exclude_none=True)
    except ValidationError as error:
        problem = error.errors()[0]
        raise HardwareError(f"{path}: {name}.{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    base = given.pop("base", None)
    given.setdefault("source", str(path))
    if base is not None:
        return replace(find_hardware(base), name=name, **given)
    missing = set(Hardware.__slots__) - set(given) - set(_DEFAULTS) - {"name"}
    if missing:
        raise HardwareError(f"{path}: {name} lacks {', '.join(sorted(missing))}; or name a `base` that has them")
    return Hardware(name=name, **(_DEFAULTS | given))


def find_hardware(name: str, file: Path | None = None) -> Hardware:
    """Return the hardware of this name, from `file` first.

    Raises:
        HardwareError: There is none, or the file can't be used.
    """
    known = HARDWARE | (load_hardware(file) if file else {})
    if name not in known:
        raise HardwareError(f"no hardware {name!r}; known: {', '.join(known)}; or cpu, measured on this machine")
    return known[name]
