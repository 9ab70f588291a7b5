"""The compiled kernels' counters: what `make profile` reads."""

import pytest
import torch
from headrace_kernels.cpu.library import counters
from headrace_kernels.linear import Linear

from tests.parity.cpu_kernels.inputs import on_threads

_CALLS = 5


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_calls_are_counted_and_threads_are_busy_within_them(num_threads):
    linear = Linear(torch.randn(768, 768))
    x = torch.randn(16, 768)

    def calls():
        before = counters()
        for _ in range(_CALLS):
            linear(x)
        return counters().since(before)

    found = on_threads(num_threads, calls)
    assert found.calls == _CALLS
    assert found.stages >= _CALLS
    # No thread is busy outside of a call, and the caller takes part.
    assert 0 < found.busy_ns <= num_threads * found.call_ns


def test_what_runs_in_torch_is_not_counted():
    before = counters()
    torch.randn(64, 64) @ torch.randn(64, 64)
    assert counters().since(before) == (0, 0, 0, 0)
