"""What the samples say: medians, our ratio to the floor and to the best of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace_core.roofline.hardware import Hardware
from headrace_core.roofline.model_shape import ModelShape
from headrace_core.roofline.roofline import Roofline, predict_step
from headrace_core.roofline.step_load import StepLoad

from tests.perf.engine.peer import CONTEXT, Samples, medians

OURS = "headrace"
EXACT = "headrace --numerics exact"
INT8 = "headrace --weights-dtype int8"
LOADED = "headrace, cores loaded"


def floors(
    shape: ModelShape, hardware: Hardware, batches: Sequence[int], lengths: Sequence[int]
) -> dict[str, Roofline]:
    """Return the least that each thing measured can take, by its name in `Samples`."""
    tokens = CONTEXT + 2
    loads = {f"decode {batch}": StepLoad.decode(batch, batch * tokens) for batch in batches}
    loads |= {f"prefill {length}": StepLoad.prefill(length) for length in lengths}
    return {name: predict_step(shape, hardware, load) for name, load in loads.items()}


def key_of(what: str) -> str:
    """Return the report's name of a thing measured."""
    return what.replace("decode ", "decode_b").replace("prefill ", "prefill_")


def summary(
    rounds: Mapping[str, Sequence[Samples]], least: Mapping[str, Roofline], why_not: Mapping[str, str]
) -> dict[str, Any]:
    """Return medians by engine, and how ours stand to the best of the others, to the floor and to a quiet machine.

    Args:
        rounds: samples of each engine that ran.
        least: floors, by what was measured.
        why_not: engines that are not to be had here.
    """
    found = {name: medians(samples) for name, samples in rounds.items()}
    ours, loaded = found[OURS], found.pop(LOADED, {})
    others = {name: each for name, each in found.items() if name not in (OURS, EXACT, INT8)}
    report: dict[str, Any] = {
        "floor_ms": {what: round(each.time_s * 1e3, 2) for what, each in least.items()},
        "floor_mb": {what: round(each.bytes / 1e6, 1) for what, each in least.items()},
        "floor_gflop": {what: round(each.flops / 1e9, 2) for what, each in least.items()},
        "engines_ms": {name: _ms(each) for name, each in found.items()} | dict.fromkeys(why_not),
        "not_measured": dict(why_not),
        "best": {},
    }
    for what, seconds in ours.items():
        key = key_of(what)
        best = min(others, key=lambda name: others[name][what], default=None)
        # In decode the ratio of times, in prefill of rates: below 1 and above 1 is ahead.
        ratio = None if best is None else seconds / others[best][what]
        if ratio and what.startswith("prefill"):
            ratio = 1 / ratio
        report["best"][key] = best
        report[f"{key}_vs_best"] = None if ratio is None else round(ratio, 3)
        report[f"{key}_vs_floor"] = round(seconds / least[what].time_s, 2)
        report |= {f"{key}_loaded_vs_quiet": round(loaded[what] / seconds, 2)} if what in loaded else {}
    for key, name in (("exact_cost", EXACT), ("int8_cost", INT8)):
        if name in found:
            report[key] = {what: round(found[name][what] / seconds, 2) for what, seconds in ours.items()}
    return report


def _ms(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(seconds * 1e3, 2) for name, seconds in figures.items()}
