"""What `make tune` tries for a key: candidates that compile within the GPU's limits, each timed and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from headrace_kernels.aot.compile import Compiled
from headrace_kernels.gpu.configs import Config, use_config
from torch import Tensor

from tests.perf.in_turn import Limits, Lost, Send, in_turn
from tests.perf.kernels.bench_case import BenchCase, TuningCase
from tests.perf.kernels.compile_ahead import Job, asked_by, compile_all, jobs_of_candidate, key_of, trouble
from tests.perf.kernels.harness import families, family_modules, is_usable, measure_us, versions

_TOLERANCE = 2e-2
# Bytes a thread. What spills so little may still be the fastest: its time tells.
_SPILLS_TO_TIME = 64


@dataclass(frozen=True)
class Trial:
    """A candidate and its median time, or why it has none."""

    config: Config
    us: float | None = None
    error: str = ""


def candidates_of(case: TuningCase) -> list[Config]:
    """Return the launcher's own configuration, then others: it, changed as the case says.

    Raises:
        ValueError: nothing that the case launches asks for its key.
    """
    family, key, changes, to_time = case
    asked = asked_by(to_time)
    if (family, key) not in asked:
        raise ValueError(f"{family} {key}: {to_time.shape} asks for {sorted(asked)}: correct the key in tuning()")
    default = dict(asked[family, key])
    others = [config for config in ({**default, **change} for change in changes) if config != default]
    return [default, *(config for number, config in enumerate(others) if config not in others[:number])]


def compiled(family: str, index: int, num_processes: int, limits: Limits) -> list[Trial]:
    """Return the candidates of a family's `index`-th tuning case; those to refuse say why. It has half of the time."""
    candidates = candidates_of(families("tuning")[family]()[index])
    numbers: dict[str, list[int]] = {}
    jobs: dict[Job, str] = {}
    for number, candidate in enumerate(candidates):
        for job in jobs_of_candidate(family, index, candidate):
            key = key_of(job)
            if key not in numbers:
                jobs[job] = key
            numbers.setdefault(key, []).append(number)
    problems: dict[int, list[str]] = {number: [] for number in range(len(candidates))}
    ends_at = None if limits.ends_at is None else (limits.ends_at + limits.clock()) / 2
    for job, found in compile_all(list(jobs), num_processes, replace(limits, ends_at=ends_at)):
        whose = numbers[jobs[job]]
        # What is launched without tuning may spill: it is what others are compared with.
        if 0 not in whose or isinstance(found, Lost) or found.resources is None:
            for number in whose:
                problems[number] += refusal(found)
    return [Trial(config, error="; ".join(problems[number])) for number, config in enumerate(candidates)]


def refusal(found: Compiled | Lost) -> tuple[str, ...]:
    """Return why a candidate whose launch compiled like that is not worth timing; empty if it is."""
    problems = trouble(found)
    if isinstance(found, Lost) or found.resources is None or len(problems) != 1:
        return problems
    return () if 0 < found.resources.spilled_bytes <= _SPILLS_TO_TIME else problems


def timed(family: str, index: int, trials: Sequence[Trial], limits: Limits) -> list[Trial]:
    """Return the trials with their times, those that were not refused before."""
    good = [trial.config for trial in trials if not trial.error]
    work = partial(_time_from, family, index, trials[0].config, good)
    found = in_turn(len(good), work, limits, preload=[*family_modules(), __name__])
    return [trial if trial.error else _known(trial, next(found)) for trial in trials]


def _known(trial: Trial, found: Trial | Lost) -> Trial:
    return replace(trial, error=found.why) if isinstance(found, Lost) else found


def _time_from(family: str, index: int, default: Config, candidates: Sequence[Config], first: int, send: Send) -> None:
    _, key, _, case = families("tuning")[family]()[index]
    expected: list[Tensor] | None = None
    for candidate in candidates[first:]:
        try:
            if expected is None:
                expected = _result(family, key, default, case)
            trial = _try(family, key, candidate, case, expected)
        except Exception as error:  # noqa: BLE001 - a candidate that does not fit the GPU is one that is not chosen
            trial = Trial(candidate, error=f"{type(error).__name__}: {error}")
        finally:
            torch.cuda.empty_cache()
        send(trial)
        if trial.error and not is_usable():
            return


def _try(family: str, key: str, candidate: Config, case: BenchCase, expected: list[Tensor]) -> Trial:
    """Time a candidate; its result must be that of the default."""
    torch.manual_seed(0)
    with use_config(family, candidate, key):
        calls = case.calls()
        if not is_close(_tensors(calls[0]()), expected):
            return Trial(candidate, error="computes something else than the default does")
        return Trial(candidate, measure_us(calls))


def _result(family: str, key: str, config: Config, case: BenchCase) -> list[Tensor]:
    torch.manual_seed(0)
    with use_config(family, config, key):
        return _tensors(case.calls()[0]())


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.float().cpu()]
    return [t.float().cpu() for t in result if isinstance(t, Tensor)] if isinstance(result, (tuple, list)) else []


def is_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Say whether two results agree up to the order of summation, relative to the largest value of each tensor."""
    return len(found) == len(expected) and all(
        a.shape == b.shape
        and (a.numel() == 0 or bool((a - b).abs().max() <= _TOLERANCE * b.abs().max().clamp(min=1e-6)))
        for a, b in zip(found, expected, strict=True)
    )


def best(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the fastest trial as an entry of the file; ValueError with the first failure's reason if none ran."""
    timed_ones = [(trial.us, index) for index, trial in enumerate(trials) if trial.us is not None]
    if not timed_ones:
        raise ValueError(f"none of {len(trials)} candidates runs: {trials[0].error if trials else 'there are none'}")
    us, index = min(timed_ones)
    return {"config": dict(trials[index].config), "us": us, "num_candidates": len(trials), "num_ran": len(timed_ones)}


def entry(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was chosen with when and with which versions it was."""
    return {**chosen, "at": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}


def keep(path: Path, gpu: str, family: str, key: str, chosen: dict[str, Any]) -> None:
    """Put an entry into the file of configurations, in place of the one for that family and key if there is one."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"device": gpu, "families": {}}
    content["families"].setdefault(family, {})[key] = chosen
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    partial_path.replace(path)
