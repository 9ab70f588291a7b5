"""The benchmarks on the pretended GPU: every family's first case, made small, and the engine's decode step.

Its times mean nothing. That a case runs, goes into a graph and has the peers it names is what a quarter of an hour on
a GPU is too short to find out.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from headrace_kernels.fp8_groups import FP8

from tests.parity.kernels.conftest import HAS_GPU
from tests.perf.gpu_engine import step
from tests.perf.gpu_engine.shapes import SHAPES
from tests.perf.gpu_engine.weights import random_model
from tests.perf.kernels import ceilings, harness
from tests.perf.kernels.ceilings import H200_ASSUMED
from tests.perf.kernels.harness import families
from tests.perf.kernels.measure import How, row_of
from tests.perf.kernels.moe_experts import Layer

pytestmark = pytest.mark.skipif(HAS_GPU, reason="there is a GPU: make kernels-bench measures on it")

FEW_SLOTS = {"_SLOTS": 128}
# What the interpreter takes too long for, smaller. The other families' first cases are one token's.
SMALLER = {
    "causal_attention": {"HEADS": {"tiny": (4, 2, 32, 16)}, "LENGTHS": (20,)},
    "decode_linear": {"NORM_SHAPES": {"tiny": (64, 96)}, "ADD_SHAPES": {"tiny": (64, 96)}, "TOKENS": (1,)},
    "gqa_decode": {"_HEADS": 4, "_GROUPS": 2, "_DIM": 32},
    "gqa_prefill": {"_HEADS": 4, "_GROUPS": 2, "_DIM": 32, "CHUNKS": ((20, 64),)},
    "grouped_gemm": {"LAYERS": {"tiny": (64, 32, 4, 2)}},
    "latent_load": FEW_SLOTS,
    "latent_store": FEW_SLOTS,
    "mla_decode": {"PUBLISHED_US": {(16, 1, 64): None}},
    "mla_prefill": {"HEADS": {"tiny": 2}, "CHUNKS": ((20, 64),)},
    "mla_prologue": {"HEADS": {"tiny": 2}, **FEW_SLOTS},
    "moe_experts": {
        "LAYERS": [Layer("tiny", 64, 32, 4, 2, 4, dtype, {}) for dtype in (torch.bfloat16, FP8)],
        "TOKENS": (1,),
    },
    "moe_router": {"WIDTHS": {"Mixtral": 64}},
    "page_copy": {"_NUM_PAGES": 64, "_CALLS": 1, "PAGE": (4, 16)},
    "rope": {"SHAPES": {"tiny": (2, 32, 16)}},
    "sampling": {"VOCAB_SIZES": {"tiny": 300}},
}
# Where one case is not like another: the first of each kind. Elsewhere the first of all.
KINDS = {
    "decode_linear": (0, 1),
    "latent_store": (0, 3),
    "moe_experts": (0, 1),
    "page_copy": (0, 2),
    "rms_norm": (0, 9),
    "sampling": (0, 1),
}


@pytest.fixture(autouse=True)
def once(monkeypatch):
    """Time one replay of one call."""
    for name, value in {"_GRAPH_S": 1e-9, "_REPLAYS": 1, "_WARM_UP_REPLAYS": 0, "_EAGER_ROUNDS": 1}.items():
        monkeypatch.setattr(harness, name, value)


@pytest.mark.parametrize("family", families("cases"))
def test_a_case_of_every_family_is_measured_beside_its_peers(family, monkeypatch):
    module = sys.modules[f"tests.perf.kernels.{family}"]
    for name, value in SMALLER.get(family, {}).items():
        monkeypatch.setattr(module, name, value)
    if hasattr(module, "num_buffers"):
        monkeypatch.setattr(module, "num_buffers", lambda _: 1)
    cases = module.cases()
    for case in [cases[number] for number in KINDS.get(family, (0,))]:
        row = row_of(case, H200_ASSUMED, How(), [])
        assert not row.error
        assert row.us is not None
        assert set(row.peers) == {*case.peers, *case.eager_peers}
        assert all(isinstance(us, float) for us in row.peers.values()), row.peers
    assert harness.is_usable()


def test_the_ceilings_are_measured(monkeypatch):
    for name, value in {"_BYTES": 2**15, "_GEMM": 64, "_FP32_GEMM": 64}.items():
        monkeypatch.setattr(ceilings, name, value)
    found = ceilings.measure()
    assert min(found.copy_tb_s, found.read_tb_s, found.bf16_tflops, found.launch_gap_us) > 0


def test_the_engines_decode_step_is_measured(tmp_path, monkeypatch):
    # It takes as long as the rest and has tests of its own.
    monkeypatch.setattr(step, "check_kernels", lambda *_: 0.0)
    monkeypatch.setattr(step, "_WARM_UP_STEPS", 0)
    shape = replace(SHAPES["tiny"], batches=(1,))
    model = random_model(shape.model_config(tmp_path), device="cuda", on_bytes=lambda *_: None)
    found = step.measure_steps(model, shape, H200_ASSUMED, num_rounds=1, report=lambda _: None)
    row = found["batches"]["1"]
    assert min(row[name] for name in ("replay_ms", "host_ms", "step_ms", "floor_ms", "fraction", "experts_hit")) > 0
