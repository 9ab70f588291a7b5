"""The kernels' tuner as far as it goes without a GPU: choosing, keeping."""

import json

import pytest
import torch
from headrace_kernels.gpu import configs

from tests.perf.kernels.harness import families
from tests.perf.kernels.tune import Trial, best, is_close, keep


def test_every_family_tunes_keys_with_its_own_cases():
    for name, make in families("tuning").items():
        for family, key, candidates, to_time in make():
            assert (family, to_time.family) == (name, name)
            assert key
            assert len(candidates) > 1


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
