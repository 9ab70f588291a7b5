"""From the figures of the engine's parts to the tables of docs/kernels.md. Pure: no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOT_MEASURED = "not measured"
# The shape they are set for.
_TARGET_SHAPE = "v2-lite"
_TARGETS = {"1": "60%", "32": "85%", "128": "85%"}
_HEADING = ("GPU", "measured", "torch", "triton", "cuda", "driver")


def tables(engine: Mapping[str, Any], step_floors: Mapping[str, Any]) -> str:
    """Return the Markdown of all parts; a part that `engine` lacks is "not measured".

    `step_floors` has the step's figures without times, for when there are none.
    """
    parts = (
        _step(engine.get("step", step_floors)),
        _tokens(engine.get("tokens", {})),
        _cluster(engine.get("cluster", {})),
    )
    return "\n\n".join(parts)


def _step(part: Mapping[str, Any]) -> str:
    columns = ("Batch", "Replay, ms", "Floor, ms", "% of floor", "Target", "Roofline, ms", "Experts hit a layer",
               "Launches a layer", "Host, ms", "Step, ms")  # fmt: skip
    targets = _TARGETS if part.get("shape", _TARGET_SHAPE) == _TARGET_SHAPE else {}
    rows = [
        (
            batch,
            _number(row.get("replay_ms"), "{:.3f}", NOT_MEASURED),
            _number(row["floor_ms"], "{:.3f}"),
            _number(row.get("fraction"), "{:.0%}"),
            targets.get(batch, "–"),
            _number(row["roofline_ms"], "{:.3f}"),
            _number(row.get("experts_hit"), "{:.1f}"),
            _number(row.get("launches_per_layer"), "{:d}"),
            _number(row.get("host_ms"), "{:.3f}"),
            _number(row.get("step_ms"), "{:.3f}"),
        )
        for batch, row in part.get("batches", {}).items()
    ]
    check = part.get("kernels_check")
    what = f"**Decode step** of {part.get('layers')} layers at a context of {part.get('context')} tokens"
    return _part(
        f"{what}{'' if check is None else f'; kernels against plain torch {_check(check)}'}", part, columns, rows
    )


def _tokens(part: Mapping[str, Any]) -> str:
    columns = ("Checkpoint", "Equal, plain steps", "Equal, captured steps", "Of", "Kernels against plain torch")
    rows = [
        (name, str(row["equal"]), str(row["equal_captured"]), str(row["num_tokens"]), _check(row["kernels_check"]))
        for name, row in part.get("checkpoints", {}).items()
    ]
    return _part("**Greedy tokens** equal to transformers', float32, same GPU", part, columns, rows)


def _cluster(part: Mapping[str, Any]) -> str:
    columns = ("In/out", "Clients", "Requests", "TTFT, ms", "ITL, ms", "tokens/s of a request", "tokens/s")
    rows = [
        (
            f"{row['tokens_in']}/{row['tokens_out']}",
            str(row["clients"]),
            str(row["requests"]),
            _percentiles(row["ttft_ms"]),
            _percentiles(row["itl_ms"]),
            _percentiles(row["request_tokens_per_s"]),
            f"{row['tokens_per_s']:.0f}",
        )
        for row in part.get("cells", [])
    ]
    title = "**Cluster**: router, prefill and decode process on one GPU; percentiles 25 / 50 / 99"
    return _part(title, part, columns, rows)


def _part(title: str, part: Mapping[str, Any], columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    if "error" in part:
        return f"{title}: failed: {part['error']}."
    what = "; ".join(f"{name} {part[name]}" for name in _HEADING if name in part) or NOT_MEASURED
    what += "; cut off before its end" if part.get("unfinished") else ""
    rows = list(rows)
    if not rows:
        return f"{title}: {what}."
    lines = [f"| {' | '.join(columns)} |", f"|{'--:|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([f"{title}. {what}.", "", *lines])


def _number(value: float | None, form: str, none: str = "–") -> str:
    return none if value is None else form.format(value)


def _check(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1e}"


def _percentiles(values: Mapping[str, float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values.values())
