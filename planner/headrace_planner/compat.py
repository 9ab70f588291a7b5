"""The published MoE-intensity page's own formulas, so that its figures can be had again and compared.

They are simpler than `operations`, and in places wrong; docs/roofline.md says where and why. Its symbols: B sequences
of S tokens, D hidden, E experts of which a token takes K, V vocabulary; T tokens, t of an expert. Two bytes a value.

Source: arthurdouillard.com/intensity, February 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headrace_core.roofline.formula import evaluate
from headrace_core.roofline.hardware import HARDWARE

CompatPhase = Literal["prefill", "sampling"]

COMPAT_HARDWARE = ("tpu-v5e", "tpu-v5p", "tpu-v6e", "b200")
"""The page's accelerators; their figures are those of `HARDWARE`."""


@dataclass(frozen=True, slots=True)
class CompatSetting:
    """The page's inputs and their defaults. `num_layers` is shown there and changes no intensity."""

    hidden_size: int = 2048
    num_tokens: int = 32_768
    batch: int = 128
    vocab_size: int = 131_072
    num_experts: int = 8
    num_experts_per_token: int = 2
    num_layers: int = 32


@dataclass(frozen=True, slots=True)
class CompatOperation:
    """A line of the page."""

    name: str
    flops: float
    bytes: float
    flops_formula: str
    bytes_formula: str

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes


# Name, FLOPs, bytes; T is B*S in prefill and B in sampling.
_FORMULAS = (
    ("layer norm", "3*T*D", "4*T*D"),
    ("QKV projection", "6*T*D*D", "2*(3*D*D + 4*T*D)"),
    ("attention softmax", "", ""),
    ("output projection", "2*T*D*D", "2*(D*D + 2*T*D)"),
    ("router", "2*T*D*E", "2*(D*E + T*D + T*E)"),
    ("expert up", "8*t*D*D", "2*(4*D*D + 5*t*D)"),
    ("expert down", "8*t*D*D", "2*(4*D*D + 5*t*D)"),
    ("output embedding", "2*T*D*V", "2*(D*V + T*D + T*V)"),
)
_SOFTMAX = {
    "prefill": ("B*(2*S*S*D + 5*S*S)", "2*(2*B*S*D + B*S*S)"),
    "sampling": ("B*(2*S*D + 5*S)", "2*(2*B*S*D + B*S)"),
}


def compat_operations(phase: CompatPhase, setting: CompatSetting | None = None) -> list[CompatOperation]:
    """Return the page's operations in the page's order."""
    given = setting or CompatSetting()
    tokens = given.batch * (given.num_tokens if phase == "prefill" else 1)
    symbols = {
        "T": tokens,
        "t": tokens * given.num_experts_per_token / given.num_experts,
        "B": given.batch,
        "S": given.num_tokens,
        "D": given.hidden_size,
        "E": given.num_experts,
        "V": given.vocab_size,
    }
    rows = [(name, flops or _SOFTMAX[phase][0], moved or _SOFTMAX[phase][1]) for name, flops, moved in _FORMULAS]
    operations: list[CompatOperation] = []
    for name, flops, moved in rows:
        values = evaluate((flops, moved), symbols)
        operations.append(CompatOperation(name, values[0], values[1], flops, moved))
    return operations


def compat_critical_intensities() -> dict[str, float]:
    """Return FLOPs per byte at the ridge of each of the page's accelerators."""
    return {name: HARDWARE[name].critical_intensity() for name in COMPAT_HARDWARE}
