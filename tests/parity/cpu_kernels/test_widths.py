"""Vectors of sixteen, as AVX-512 has them, on a machine without: the same bits as vectors of eight.

The order of a sum does not depend on the width. What is compiled here for sixteen lanes the compiler makes of two
vectors of eight; the source that it compiles is the one of AVX-512.
"""

from __future__ import annotations

import pytest
import torch
from headrace_kernels.block_fp8 import BlockFp8
from headrace_kernels.cpu import build, library
from headrace_kernels.gqa_decode import gqa_decode
from headrace_kernels.linear import Linear
from headrace_kernels.sampling import sample_tokens

from tests.parity.cpu_kernels.inputs import plain, random
from tests.parity.cpu_kernels.test_decode_attention import Grouped, contexts_of, laid_out
from tests.parity.cpu_kernels.test_sampling import draws

# A family whose lanes are outputs, in blocks of twelve rows; one whose lanes are terms, with a softmax; one in float64.
FAMILIES = frozenset({"linear", "gqa_decode", "sampling"})


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> library.Library:
    flags = build.isas().get("avx2")
    if flags is None:
        pytest.skip("this processor's vectors have one width")
    path = tmp_path_factory.mktemp("wide") / "wide.so"
    try:
        # Hardly optimised, which takes a third of the time; products and sums are still rounded at once, as they must.
        build.build(
            path, {"wide": (*flags, "-DHEADRACE_WIDTH=16", "-Wno-psabi", "-O1", "-fexpensive-optimizations")}, FAMILIES
        )
    except build.NoCompilerError as error:
        pytest.skip(str(error))
    return library.Library(path, "wide")


def on_library(monkeypatch, other, run):
    with monkeypatch.context() as patch:
        patch.setattr(library, "_library", lambda: other)
        return run()


@pytest.mark.parametrize("num_rows", [1, 5, 6, 7, 12, 13, 31])
@pytest.mark.parametrize("held", ["as numbers", "in 8 bits", "in blocks of FP8"])
def test_linear_layers_are_the_same(num_rows, held, wide, monkeypatch, dtype):
    weight, bias, norm = plain(50, 133, dtype=dtype), plain(50, dtype=dtype), plain(133, dtype=dtype)
    if held == "in blocks of FP8":
        weight = BlockFp8((20 * weight).to(torch.float8_e4m3fn), torch.rand(7, 2), (8, 128))
    linear = Linear(weight, bias, is_int8=held == "in 8 bits", dtype=dtype)
    x, residual = random(num_rows, 133, dtype=dtype), random(num_rows, 50, dtype=dtype)
    for run in (lambda: linear.after_norm(x, norm, 1e-5), lambda: linear.added_to(residual, x)):
        assert torch.equal(on_library(monkeypatch, wide, run), run())


@pytest.mark.parametrize("shape", [(1, 1, 16), (6, 3, 41), (14, 2, 24)])
def test_attention_is_the_same(shape, wide, monkeypatch, dtype):
    case = Grouped(*shape)
    where = laid_out(case, contexts_of(case, [1, 63, 64, 65, 200], dtype), 16, dtype)
    query = case.query(5, dtype)

    def run():
        return gqa_decode(query, *where, scale=0.3)

    assert torch.equal(on_library(monkeypatch, wide, run), run())


def test_the_best_set_of_the_machine_is_taken(wide):
    assert library.isa() in build.isas()
    assert wide.isa == "wide"


def test_tokens_are_the_same(wide, monkeypatch):
    logits, columns = random(16, 5001, dtype=torch.float32), draws(5001)
    assert torch.equal(
        on_library(monkeypatch, wide, lambda: sample_tokens(logits, columns)), sample_tokens(logits, columns)
    )
