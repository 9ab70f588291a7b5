"""A kernel whose wgmma instructions ptxas serialises is told, whether it was compiled now or comes from the cache."""

import pytest
import torch
import triton.language as tl
from headrace_kernels.aot.compile import compile_launch
from headrace_kernels.gpu.launch import Launch
from triton import knobs
from triton.runtime.jit import JITFunction


def _two_products(a_ptr, b_ptr, c_ptr, out_ptr, middle, end, LOOPS: tl.constexpr, N: tl.constexpr):
    """With two loops the accumulator may come to the second one from either side of the first."""
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + row * N + column)
    acc = tl.zeros([N, N], tl.float32)
    middle = middle // N * N
    for loop in tl.static_range(LOOPS):
        for start in tl.range(middle if loop else 0, end if loop == LOOPS - 1 else middle, N):
            place = start.to(tl.int64) * N + row * N + column
            scores = tl.dot(a, tl.trans(tl.load(b_ptr + place)))
            acc = tl.dot(scores.to(tl.bfloat16), tl.load(c_ptr + place), acc)
    tl.store(out_ptr + row * N + column, acc)


def compiled(loops):
    tile = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    arguments = (tile, tile, tile, tile.float(), 129, 257)
    return compile_launch(Launch(JITFunction(_two_products), (1,), arguments, {"LOOPS": loops, "N": 64}, 4, 3), "cuda")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path):
    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(tmp_path)
        yield


def test_products_of_one_loop_overlap():
    found = compiled(loops=1)
    assert (found.resources.matrix_units, found.resources.serialised, found.problems) == ("wgmma", "", ())


def test_products_that_wait_for_one_another_are_a_problem_also_from_the_cache():
    for from_cache in (False, True):
        found = compiled(loops=2)
        assert found.from_cache == from_cache
        assert found.resources.matrix_units == "wgmma"
        assert "non wgmma instructions defining accumulator registers" in found.resources.serialised
        assert found.problems[0].startswith("wgmma instructions are serialised due to non wgmma instructions")
