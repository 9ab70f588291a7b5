"""A group whose weights stay in FP8 computes what one process does that dequantises them; ranks are threads here.

The tiny networks are narrower than a block of 128, so that every cut is within one.
"""

from __future__ import annotations

import pytest
import torch
from headrace_core.expert_placement import in_order
from headrace_core.model.build import num_weight_bytes
from headrace_core.model.load import load_model
from headrace_core.model.weights_dtype import WeightsDtype
from headrace_core.ranks.dispatch_dtype import DispatchDtype
from headrace_core.ranks.group import OneRank, Ranks
from headrace_core.ranks.layout import ParallelLayout
from headrace_core.testing.paged_sequences import PagedSequences
from headrace_core.testing.rank_threads import OnThread, RankThreads
from headrace_core.testing.tiny_checkpoints import TINY_CONFIGS, write_fp8_checkpoint

from tests.parity.rank_cases import Options, steps

FP8 = WeightsDtype.FP8
CASES = [
    ("v3", "tp2", "tp2"),
    ("v3", "tp2", "ep2"),
    ("v3", "dp2", "tp2"),
    ("v3", "tp4", "tp4"),
    ("v2", "dp2", "ep2"),
    ("v32", "tp2", "ep2"),
    ("qwen3-moe", "tp2", "tp2"),
]


def on_ranks(names, run):
    """Return what `run(ranks)` returns on each rank."""
    layout = ParallelLayout.parse(*names)
    group = RankThreads(layout.size)
    running = [
        OnThread(lambda rank=rank: run(Ranks(layout, rank, rank if layout.num_lanes == 1 else OneRank())))
        for rank in group.ranks
    ]
    return [each.result() for each in running]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def of(name, block=(128, 128)):
        path = tmp_path_factory.mktemp(name)
        write_fp8_checkpoint(path, TINY_CONFIGS[name], block)
        return path

    return of


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits_of_a_group_are_those_of_dequantised_weights(case, folder):
    name, *names = case
    path = folder(name)
    expected = steps(path, Options(dtype="float32"))
    alone = steps(path, Options(dtype="float32", weights=FP8))
    found = on_ranks(names, lambda ranks: steps(path, Options(dtype="float32", weights=FP8), ranks))[0]
    assert found.fingerprint == alone.fingerprint != expected.fingerprint
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("names", [("tp2", "tp2"), ("tp2", "ep2")], ids="-".join)
def test_a_rank_says_the_bytes_of_its_part(names, folder):
    path = folder("v3", (16, 16))
    alone = load_model(path, dtype="bfloat16", weights_dtype=FP8).weight_bytes
    for model in on_ranks(names, lambda ranks: load_model(path, dtype="bfloat16", weights_dtype=FP8, ranks=ranks)):
        assert alone / 2 < model.weight_bytes < 0.8 * alone
        assert model.weight_bytes < num_weight_bytes(model.config, torch.bfloat16)


def test_tokens_travel_in_fp8_to_experts_in_fp8(folder):
    path = folder("v3")
    options = [
        Options(dtype="float32", weights=weights, dispatch=DispatchDtype.FP8) for weights in (FP8, WeightsDtype.AUTO)
    ]
    alone, wide = (steps(path, each) for each in options)
    found = on_ranks(("dp2", "ep2"), lambda ranks: steps(path, options[0], ranks))[0]
    assert found.fingerprint == alone.fingerprint != wide.fingerprint
    for ours, theirs, dequantised in zip(found.logits, alone.logits, wide.logits, strict=True):
        # A value that lies between two of fp8 may be taken for the other one.
        assert (ours - theirs).abs().median() < 1e-3
        assert (theirs - dequantised).abs().median() < 1e-3


def test_experts_move_in_fp8(folder):
    """What a rank newly holds it reads from the checkpoint as it is stored; what it had is copied."""
    path = folder("v3")

    def run(ranks):
        model = load_model(path, dtype="float32", weights_dtype=FP8, ranks=ranks, redundant_experts=2)
        before = logits(model)
        after = tuple(tuple(sorted((expert + 3) % 8 for expert in held)) for held in in_order(8, 2, 2).ranks)
        for layer in model.store.slots:
            model.store.prepare(layer, after, lambda: True)
            model.store.switch(layer, after)
        return before, logits(model)

    def logits(model):
        sequences = PagedSequences(model, page_size=8, num_pages=8)
        return model.all_logits([sequences.chunk(0, list(range(3, 40)))], sequences.cache)[0]

    before, after = on_ranks(("tp2", "ep2"), run)[0]
    assert torch.equal(before, after)
