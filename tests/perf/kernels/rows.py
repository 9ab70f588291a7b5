"""From a case and its time to a row, and from rows to the table. Pure: no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tests.perf.kernels.bench_case import BenchCase
from tests.perf.kernels.ceilings import H200_ASSUMED, Ceilings

NOT_MEASURED = "not measured"
PUBLISHED_GPU = "H200"
"""The card that every published figure comes from."""


@dataclass(frozen=True)
class Row:
    """One case: its floor, its median time (None: not measured), the peers' times or why they have none.

    `is_in_l2` says that all buffers together fit the L2 cache twice over or less although bytes bound the case: its
    time is then no measure of memory. `published_us` is another's time on `PUBLISHED_GPU`, and `published_fraction` the
    share of it that the floor is there: on another GPU only shares of the floor can be compared.
    """

    family: str
    shape: str
    floor_us: float
    bound: str
    us: float | None = None
    error: str = ""
    peers: dict[str, float | str] = field(default_factory=dict)
    published_us: float | None = None
    published_fraction: float | None = None
    published_source: str = ""
    is_in_l2: bool = False

    @property
    def fraction(self) -> float | None:
        """How much of the measured time the floor is; None if not measured."""
        return None if self.us is None else self.floor_us / self.us


def floor(case: BenchCase, ceilings: Ceilings) -> tuple[float, str]:
    """Return the shortest time that the case can take, µs, and what bounds it: "bytes" or the matrix rate's name."""
    if case.bytes_moved <= 0 and case.flops <= 0:
        raise ValueError(f"{case.family} {case.shape}: a case needs bytes_moved or flops above 0")
    bytes_us = case.bytes_moved / ceilings.tb_s() / 1e6
    flops_us = case.flops / ceilings.tflops(case.ceiling) / 1e6
    return (bytes_us, "bytes") if bytes_us >= flops_us else (flops_us, case.ceiling)


def fits_l2(case: BenchCase, num_calls: int, l2_bytes: int, bound: str) -> bool:
    """Say whether the calls' buffers together are too small to measure memory: less than twice the L2 cache."""
    return bound == "bytes" and case.bytes_moved * num_calls < 2 * l2_bytes


def unmeasured(case: BenchCase, ceilings: Ceilings) -> Row:
    """Return the row of a case without a time."""
    floor_us, bound = floor(case, ceilings)
    peers: dict[str, float | str] = dict.fromkeys((*case.peers, *case.eager_peers), NOT_MEASURED)
    row = Row(case.family, case.shape, floor_us, bound, peers=peers)
    if case.published_us is None:
        return row
    return replace(
        row,
        published_us=case.published_us,
        published_fraction=floor(case, H200_ASSUMED)[0] / case.published_us,
        published_source=case.published_source,
    )


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as kernels-gpu.json has them, each with its fraction of the floor."""
    return [asdict(row) | {"fraction": row.fraction} for row in rows]


def table(rows: Sequence[Row], ceilings: Ceilings, heading: Mapping[str, str]) -> str:
    """Return the Markdown table under a paragraph of what `heading` names: GPU, date, versions.

    Published times stand beside ours only if the GPU is the one they come from; else their shares of the floor do.
    """
    is_same_gpu = PUBLISHED_GPU in heading["GPU"]
    what = "; ".join(f"{name} {value}" for name, value in heading.items())
    fp8 = NOT_MEASURED if ceilings.fp8_tflops is None else f"{ceilings.fp8_tflops:.0f} TFLOP/s"
    lines = [
        f"{what}. Ceilings: copy {ceilings.copy_tb_s:.2f} TB/s, read {ceilings.read_tb_s:.2f} TB/s, "
        f"bf16 {ceilings.bf16_tflops:.0f} TFLOP/s, fp8 {fp8}, fp32 without matrix units {ceilings.fp32_tflops:.0f} "
        f"TFLOP/s, {ceilings.launch_gap_us:.1f} µs from one empty kernel to the next.",
        "",
        f"| Family | Shape | µs | Floor, µs | Bound by | % of floor | Peers, µs | "
        f"Published on an {PUBLISHED_GPU} (% of floor) |",
        "|---|---|--:|--:|---|--:|---|---|",
    ]
    sources = list(dict.fromkeys(row.published_source for row in rows if row.published_us is not None))
    notes = [f"[{number}] {source}  " for number, source in enumerate(sources, 1)]
    body = [_line(row, sources, is_same_gpu=is_same_gpu) for row in rows]
    return "\n".join([*lines, *body, *([""] if notes else []), *notes])


def _line(row: Row, sources: list[str], *, is_same_gpu: bool) -> str:
    time = row.error or (NOT_MEASURED if row.us is None else f"{row.us:.1f}" + (" (in L2)" if row.is_in_l2 else ""))
    share = "–" if row.fraction is None else f"{row.fraction:.0%}"
    peers = "; ".join(_peer(name, us) for name, us in row.peers.items()) or "–"
    published = _published(row, sources, is_same_gpu=is_same_gpu)
    cells = (row.family, row.shape, time, f"{row.floor_us:.1f}", row.bound, share, peers, published)
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _published(row: Row, sources: list[str], *, is_same_gpu: bool) -> str:
    if row.published_us is None:
        return "–"
    share = f"{row.published_fraction:.0%}"
    told = f"{row.published_us:g} µs ({share})" if is_same_gpu else share
    return f"{told} [{sources.index(row.published_source) + 1}]"


def _peer(name: str, us: float | str) -> str:
    if us == NOT_MEASURED:
        return name
    return f"{name} {us}" if isinstance(us, str) else f"{name} {us:.1f}"
