"""Deployments whose throughput was published, beside what the roofline says of them with the inputs as published.

No constant here, or in the roofline, was fitted to these rows. `python -m headrace_planner.published` prints the table
of docs/planner.md; a test holds both together, and that no floor is below what was reached.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from headrace_core.roofline.communication import Parallelism
from headrace_core.roofline.hardware import HARDWARE, Hardware
from headrace_core.roofline.model_shape import MODELS, Dtype
from headrace_core.roofline.operations import Phase
from headrace_core.roofline.roofline import Roofline, roofline

_H100 = HARDWARE["h100"]
_H800 = replace(_H100, name="h800", link_bytes_per_s=200e9, source="NVLink 400 GB/s both ways")
_NODE = 8


@dataclass(frozen=True, slots=True)
class Deployment:
    """DeepSeek-V3 or R1 in FP8 on nodes of eight GPUs, experts and attention spread over all `num_gpus`.

    `reached` is in tokens per second and node, computed ones. `batch` sequences are on each GPU; of a prefill, prompts.
    `context` counts a sequence's tokens. `source` says who published it; `inferred` what of the inputs they did not.
    """

    source: str
    hardware: Hardware
    phase: Phase
    num_gpus: int
    batch: int
    context: int
    reached: float
    inferred: str = ""

    def roof(self) -> Roofline:
        """Return the roofline of one of its steps."""
        return roofline(
            MODELS["deepseek-v3"],
            self.hardware,
            phase=self.phase,
            batch=self.batch * self.num_gpus,
            context=self.context,
            parallel=Parallelism(1, self.num_gpus, self.num_gpus),
            dtype=Dtype.FP8,
        )

    def floor(self) -> float:
        """Return tokens per second and node at the roof."""
        new = self.context if self.phase == "prefill" else 1
        return self.batch * new * _NODE / self.roof().time_s


_DEEPSEEK = "DeepSeek, open-source week, day 6"
_SGLANG = "SGLang, 5 May 2025"
_CACHED = 0.563
"""Of DeepSeek's prompt tokens so many were in the cache: its 73.7k are all, the others were computed."""

DEPLOYMENTS = (
    Deployment(
        _DEEPSEEK, _H800, "prefill", 32, 4, 4096, 73_700 * (1 - _CACHED), "prompts' length; all computed, none cached"
    ),
    Deployment(_DEEPSEEK, _H800, "decode", 144, 88, 4989, 14_800, "88 sequences a GPU: 14.8k at 21 tokens/s each"),
    Deployment(_SGLANG, _H100, "prefill", 32, 4, 4096, 50_302, "16,384 tokens a GPU and step"),
    Deployment(_SGLANG, _H100, "decode", 72, 256, 2050, 22_282),
)


def table() -> str:
    """Return the table of docs/planner.md, in Markdown."""
    lines = [
        "| published by | GPUs | step | reached, tokens/s and node | floor | of it | what bounds it | inferred |",
        "|---|---|---|--:|--:|--:|---|---|",
    ]
    for row in DEPLOYMENTS:
        bounds = sorted(row.roof().shares_by_bound().items(), key=lambda item: -item[1])[:2]
        shares = ", ".join(f"{name} {share:.0%}" for name, share in bounds)
        lines.append(
            f"| {row.source} | {row.num_gpus} {row.hardware.name.upper()} | {row.phase}, {row.batch} × {row.context:,} "
            f"a GPU | {row.reached:,.0f} | {row.floor():,.0f} | {row.reached / row.floor():.0%} | {shares} | "
            f"{row.inferred or '–'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
