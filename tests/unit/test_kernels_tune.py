"""`make tune` without a GPU: what it tries, what it refuses, what it keeps when time is over."""

import json

import pytest
import torch
from headrace_kernels.aot.compile import Compiled
from headrace_kernels.aot.resources import Resources
from headrace_kernels.gpu import configs

from tests.perf.in_turn import NO_TIME, Limits, Lost
from tests.perf.kernels import trials, tune
from tests.perf.kernels.bench_case import BenchCase
from tests.perf.kernels.compile_ahead import asked_by
from tests.perf.kernels.harness import families
from tests.perf.kernels.tiles import fits
from tests.perf.kernels.trials import Trial, best, candidates_of, is_close, keep

FAMILY = "family"
CHANGES = [{"BLOCK_M": 32}, {"BLOCK_M": 16}, {"BLOCK_M": 64}, {"BLOCK_M": 32}]


def case_asking(keys):
    """A case whose call asks for the configurations of `keys`, as launchers do."""

    def call():
        for key in keys:
            configs.config(FAMILY, key, {"BLOCK_M": 16, "num_warps": 4}, torch.empty(0))

    return BenchCase(FAMILY, "B=1", lambda: [call], 1.0)


@pytest.fixture
def tuned(monkeypatch):
    """Two keys of a made-up family."""
    cases = [(FAMILY, key, CHANGES, case_asking(["small", "large"])) for key in ("small", "large")]
    for module in (trials, tune):
        monkeypatch.setattr(module, "families", lambda _: {FAMILY: lambda: cases})
    return cases


def test_every_family_with_a_configuration_is_tuned():
    """What any launcher asks for at the cases' shapes has candidates, or one of its family has."""
    asked = {family for make in families("cases").values() for case in _few(make()) for family, _ in asked_by(case)}
    assert asked == set(families("tuning"))
    assert {"moe_experts", "moe_router"} <= asked


def _few(cases):
    """One case of each size of a batch that launchers may tell apart."""
    return cases[:1] + cases[len(cases) // 2 :: 7] + cases[-1:]


@pytest.mark.parametrize("family", sorted(families("tuning")))
def test_a_familys_keys_are_those_its_launchers_ask_for(family):
    keys = set()
    for name, key, changes, to_time in families("tuning")[family]():
        assert (name, to_time.family) == (family, family)
        candidates = candidates_of((name, key, changes, to_time))
        assert len(candidates) > 1
        assert all(candidate.keys() == candidates[0].keys() for candidate in candidates), "all are of that kernel"
        keys.add(key)
    assert len(keys) == len(families("tuning")[family]())


def test_candidates_are_the_launchers_own_first_and_each_once(tuned):
    assert [candidate["BLOCK_M"] for candidate in candidates_of(tuned[0])] == [16, 32, 64]
    assert all(candidate["num_warps"] == 4 for candidate in candidates_of(tuned[0]))


def test_a_key_that_nothing_asks_for_is_told():
    with pytest.raises(ValueError, match=r"family nobody's: B=1 asks for .*small"):
        candidates_of((FAMILY, "nobody's", CHANGES, case_asking(["small"])))


def test_a_program_has_room_for_so_much():
    assert fits(4, shared_bytes=227 * 1024, values=128 * 128)
    assert not fits(4, shared_bytes=227 * 1024 + 1)
    assert not fits(4, values=128 * 128 + 1)


def test_a_candidate_is_for_its_key_alone():
    with configs.use_config("f", {"BLOCK_M": 64}, "large"):
        assert configs.config("f", "large", {"BLOCK_M": 16}, torch.empty(0)) == {"BLOCK_M": 64}
        assert configs.config("f", "small", {"BLOCK_M": 16}, torch.empty(0)) == {"BLOCK_M": 16}


def test_an_unknown_key_is_refused_with_those_there_are(tuned, monkeypatch, capsys):
    assert tune.wanted_cases([FAMILY], ["large"]) == [(FAMILY, 1)]
    monkeypatch.setattr("sys.argv", ["tune", "--dry-run", "--key", "huge"])
    assert tune.main() == 2
    told = capsys.readouterr().out
    assert "no key 'huge' to tune" in told
    assert f"{FAMILY}: small" in told
    assert f"{FAMILY}: large" in told


def resources(spilled_bytes):
    return Resources(registers=64, spilled_bytes=spilled_bytes, shared_bytes=0, matrix_units="")


GOOD = Compiled(resources(0), (), 0.1, False)
SPILLS = Compiled(resources(840), ("spills 840 bytes a thread",), 0.1, False)
SPILLS_LITTLE = Compiled(resources(40), ("spills 40 bytes a thread",), 0.1, False)


@pytest.mark.parametrize(
    ("found", "errors"),
    [
        ({}, ["", "", ""]),
        ({32: SPILLS}, ["", "spills 840 bytes a thread", ""]),
        ({32: SPILLS_LITTLE}, ["", "", ""]),
        # What is launched without tuning is compared with, if it runs at all.
        ({16: SPILLS}, ["", "", ""]),
        ({16: Lost("cut off after 60 s"), 64: Lost(NO_TIME)}, ["cut off after 60 s", "", NO_TIME]),
    ],
)
def test_what_does_not_compile_within_the_limits_is_not_timed(tuned, monkeypatch, found, errors):
    monkeypatch.setattr(trials, "jobs_of_candidate", lambda family, index, candidate: [candidate["BLOCK_M"]])
    monkeypatch.setattr(trials, "key_of", str)
    monkeypatch.setattr(trials, "compile_all", lambda jobs, *_: ((job, found.get(job, GOOD)) for job in jobs))
    assert [trial.error for trial in trials.compiled(FAMILY, 0, 1, Limits())] == errors


class Clock:
    """Stands still but for what `pass_s` lets pass."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def tuning_in(tuned, monkeypatch, tmp_path):
    """Tune both keys in so many seconds where each candidate takes one; return the exit code and what was kept."""

    def run(seconds):
        clock = Clock()

        def time_each(family, index, tried, limits):
            timed = []
            for number, trial in enumerate(tried):
                us = None if not limits.left_s() else 9.0 - number
                timed.append(Trial(trial.config, us, "" if us else NO_TIME))
                clock.now_s += 1.0
            return timed

        monkeypatch.setattr(tune, "compiled", lambda family, index, *_: [Trial(c) for c in candidates_of(tuned[index])])
        monkeypatch.setattr(tune, "timed", time_each)
        path = tmp_path / "tuned.json"
        limits = Limits(ends_at=seconds, clock=clock)
        code = tune.tune_all([(FAMILY, 0), (FAMILY, 1)], "G", path, 1, limits)
        return code, json.loads(path.read_text())["families"][FAMILY] if path.exists() else {}

    return run


def test_each_key_keeps_its_fastest(tuning_in):
    code, kept = tuning_in(100)
    assert code == 0
    assert {key: entry["config"]["BLOCK_M"] for key, entry in kept.items()} == {"small": 64, "large": 64}
    assert kept["small"]["versions"]["torch"] == torch.__version__


def test_when_time_is_over_what_was_found_is_kept(tuning_in):
    """Of the first key two of three candidates were timed; the second was not begun."""
    code, kept = tuning_in(2)
    assert code == 1
    assert list(kept) == ["small"]
    assert (kept["small"]["config"]["BLOCK_M"], kept["small"]["num_ran"], kept["small"]["num_candidates"]) == (32, 2, 3)


def test_without_time_nothing_is_kept(tuning_in):
    assert tuning_in(0) == (1, {})


def test_a_candidate_is_compared_with_the_default_and_a_failure_ends_only_an_unusable_process(tuned, monkeypatch):
    results = {16: 1.0, 32: 3.0, 64: 1.001}
    usable = iter((True, False))

    def calls(candidate):
        return lambda: [lambda: torch.tensor([results[candidate["BLOCK_M"]]])]

    def result_of(family, key, config, case):
        return trials._tensors(calls(config)()[0]())

    def attempt(family, key, candidate, case, expected):
        if candidate["BLOCK_M"] == 64:
            raise RuntimeError("out of resources")
        if not is_close(result_of(family, key, candidate, case), expected):
            return Trial(candidate, error="computes something else than the default does")
        return Trial(candidate, 5.0)

    monkeypatch.setattr(trials, "_result", result_of)
    monkeypatch.setattr(trials, "_try", attempt)
    monkeypatch.setattr(trials, "is_usable", lambda: next(usable))
    found = []
    candidates = candidates_of(tuned[0])
    trials._time_from(FAMILY, 0, candidates[0], [*candidates, candidates[0]], 0, found.append)
    assert [(trial.us, trial.error.partition(":")[0]) for trial in found] == [
        (5.0, ""),
        (None, "computes something else than the default does"),
        (None, "RuntimeError"),
    ], "after the second failure another process goes on"


def test_the_fastest_candidate_that_runs_is_chosen():
    trials = [Trial({"BLOCK_M": 16}, 9.0), Trial({"BLOCK_M": 32}, None, "too large"), Trial({"BLOCK_M": 64}, 7.0)]
    assert best(trials) == {"config": {"BLOCK_M": 64}, "us": 7.0, "num_candidates": 3, "num_ran": 2}
    with pytest.raises(ValueError, match="none of 1 candidates runs: too large"):
        best([trials[1]])


def test_a_candidate_that_computes_something_else_is_told():
    x = torch.tensor([1.0, -4.0])
    assert is_close([x], [x + 0.05])
    assert not is_close([x], [x + 0.5])
    assert not is_close([x, x], [x])
    assert not is_close([x * float("nan")], [x])


def test_what_was_tuned_is_what_configs_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    path = configs.tuned_path("NVIDIA H200")
    keep(path, "NVIDIA H200", "f", "small", {"config": {"BLOCK_M": 16}, "us": 9.0})
    keep(path, "NVIDIA H200", "f", "large", {"config": {"BLOCK_M": 64}, "us": 7.0})
    keep(path, "NVIDIA H200", "f", "small", {"config": {"BLOCK_M": 32}, "us": 8.0})
    assert json.loads(path.read_text())["device"] == "NVIDIA H200"
    configs._tuned.cache_clear()
    assert configs._tuned("NVIDIA H200") == {"f": {"small": {"BLOCK_M": 32}, "large": {"BLOCK_M": 64}}}
    configs._tuned.cache_clear()
