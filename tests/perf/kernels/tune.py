"""`make tune`: time every family's candidate configurations on the GPU at hand and keep the best.

    python -m tests.perf.kernels.tune [--family NAME]

Writes `tuned/<GPU>.json` beside `headrace_kernels.gpu.configs`, which reads it when kernels are launched on such a GPU:
for each family and key the configuration, its time, the number of candidates, the date and the versions. Families that
were not tuned this time keep what the file had. Nothing is tuned while serving.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from headrace_kernels.gpu.configs import Config, tuned_path, use_config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from tests.perf.kernels.bench_case import BenchCase, TuningCase
from tests.perf.kernels.harness import NoGpuError, families, measure_us, require_gpu, versions

_TOLERANCE = 2e-2

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Trial:
    """A candidate and its median time, or why it has none."""

    config: Config
    us: float | None
    error: str = ""


def main() -> int:
    """Tune what the options name; return 0, 1 if a key has no working candidate, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(families("tuning")), help="only this family")
    options = parser.parse_args()
    try:
        gpu = require_gpu()
    except NoGpuError as error:
        console.print(str(error), style="red")
        return 2
    wanted = [t for name, make in families("tuning").items() if options.family in (None, name) for t in make()]
    path = tuned_path(gpu)
    num_failed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("tuning", total=sum(len(candidates) for _, _, candidates, _ in wanted))
        for tuning_case in wanted:
            family, key, candidates, _ = tuning_case
            progress.update(bar, description=f"{family} {key}")
            trials = _try_all(tuning_case)
            progress.advance(bar, len(candidates))
            try:
                entry = best(trials) | {"at": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
            except ValueError as error:
                console.print(f"{family} {key}: {error}", markup=False, style="red")
                num_failed += 1
                continue
            keep(path, gpu, family, key, entry)
            refused = next((f"; refused: {trial.config}: {trial.error}" for trial in trials if trial.error), "")
            console.print(f"{family} {key}: {entry['us']:.1f} µs with {entry['config']}{refused}", markup=False)
    return 1 if num_failed else 0


def _try_all(tuning_case: TuningCase) -> list[Trial]:
    family, _, candidates, case = tuning_case
    trials: list[Trial] = []
    expected: list[Tensor] | None = None
    for candidate in candidates:
        trial, expected = _try(family, candidate, case, expected)
        trials.append(trial)
    return trials


def _try(
    family: str, candidate: Config, case: BenchCase, expected: list[Tensor] | None
) -> tuple[Trial, list[Tensor] | None]:
    """Time a candidate; its result must be that of the first candidate that ran, the default."""
    try:
        torch.manual_seed(0)
        with use_config(family, candidate):
            calls = case.calls()
            found = [t.float().cpu() for t in _tensors(calls[0]())]
            if expected is not None and not is_close(found, expected):
                return Trial(candidate, None, "computes something else than the default does"), expected
            return Trial(candidate, measure_us(calls)), expected if expected is not None else found
    except Exception as error:  # noqa: BLE001 - a candidate that does not fit the GPU is one that is not chosen
        return Trial(candidate, None, f"{type(error).__name__}: {error}"), expected
    finally:
        torch.cuda.empty_cache()


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for t in result if isinstance(t, Tensor)] if isinstance(result, (tuple, list)) else []


def is_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Say whether two results agree up to the order of summation, relative to the largest value of each tensor."""
    return len(found) == len(expected) and all(
        a.shape == b.shape
        and (a.numel() == 0 or bool((a - b).abs().max() <= _TOLERANCE * b.abs().max().clamp(min=1e-6)))
        for a, b in zip(found, expected, strict=True)
    )


def best(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the fastest trial as an entry of the file; ValueError with the first failure's reason if none ran."""
    timed = [(trial.us, index) for index, trial in enumerate(trials) if trial.us is not None]
    if not timed:
        raise ValueError(f"none of {len(trials)} candidates runs: {trials[0].error if trials else 'there are none'}")
    us, index = min(timed)
    return {"config": dict(trials[index].config), "us": us, "num_candidates": len(trials), "num_ran": len(timed)}


def keep(path: Path, gpu: str, family: str, key: str, entry: dict[str, Any]) -> None:
    """Put an entry into the file of configurations, in place of the one for that family and key if there is one."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"device": gpu, "families": {}}
    content["families"].setdefault(family, {})[key] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
